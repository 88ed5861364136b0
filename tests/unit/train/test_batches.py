from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from training_fakes import LABELS, TEMPLATES, ColourClips

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.train.batches import Batch, Sharding, TrainingBatches, load_batches
from actionclip_deploy.train.data import SampleKey


def keys(
    *, num_samples: int = 10, seed: int = 0, first: int = 0, last: int = 6, sharding: Sharding
) -> list[list[SampleKey]]:
    return list(TrainingBatches(num_samples, sharding, seed=seed, first=first, last=last))


def load(batches: list[list[SampleKey]], *, workers: int = 0, **choices: object) -> list[Batch]:
    return list(
        load_batches(
            ColourClips(10, **choices),  # type: ignore[arg-type]
            batches,
            num_templates=len(TEMPLATES),
            num_labels=len(LABELS),
            workers=workers,
        )
    )


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def test_an_epoch_has_every_sample_at_most_once() -> None:
    batches = keys(sharding=Sharding(3))  # 3 batches of 3 in an epoch of 10
    for epoch in (batches[:3], batches[3:]):
        counts = Counter(key.index for batch in epoch for key in batch)
        assert len(counts) == 9
        assert set(counts) <= set(range(10))


def test_epochs_have_other_orders_and_other_draws() -> None:
    batches = keys(sharding=Sharding(5), last=4)
    first, second = batches[0] + batches[1], batches[2] + batches[3]
    assert [k.index for k in first] != [k.index for k in second]
    assert not {k.seed for k in first} & {k.seed for k in second}


def test_the_order_follows_from_the_seed() -> None:
    assert keys(sharding=Sharding(5), seed=1) == keys(sharding=Sharding(5), seed=1)
    assert keys(sharding=Sharding(5), seed=1) != keys(sharding=Sharding(5), seed=2)


@pytest.mark.parametrize("first", [1, 3, 5])
def test_batches_go_on_from_any_number(first: int) -> None:
    whole = keys(sharding=Sharding(3))
    assert keys(sharding=Sharding(3), first=first) == whole[first:]
    assert len(TrainingBatches(10, Sharding(3), seed=0, first=first, last=6)) == 6 - first


def test_the_parts_of_the_processes_make_up_the_batch() -> None:
    whole = keys(sharding=Sharding(4))
    parts = [keys(sharding=Sharding(4, num_processes=2, process=p)) for p in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"run.batch_size is 4, which 3 processes cannot share"):
        Sharding(4, num_processes=3)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"run.batch_size is 11 and there are 10 training"):
        TrainingBatches(10, Sharding(11), seed=0, first=0, last=1)


def test_a_batch_holds_clips_texts_and_their_labels() -> None:
    batch = load([[SampleKey(1, 7), SampleKey(6, 8)]])[0]
    assert batch.frames.shape == (2, 4, 3, 32, 32)
    assert batch.frames.dtype == torch.uint8
    assert batch.video_labels.tolist() == [
        [False, True, False, False],
        [False, False, True, False],
    ]
    assert batch.text_labels.tolist() == batch.video_labels.tolist()
    assert (batch.prompts % len(LABELS)).tolist() == [1, 2]  # template-major
    assert batch.asked.tolist() == batch.given.tolist() == [1, 6]


def test_every_template_gets_its_share() -> None:
    drawn = np.random.default_rng(0).integers(1 << 62, size=300).tolist()
    batch = load([[SampleKey(0, seed) for seed in drawn]])[0]
    counts = Counter((batch.prompts // len(LABELS)).tolist())
    assert sorted(counts) == [0, 1, 2]
    assert min(counts.values()) > 70  # 100 expected, 8 the standard deviation


def test_a_text_names_one_of_the_labels_of_a_video() -> None:
    batch = load([[SampleKey(1, seed) for seed in range(40)]], second_label=True)[0]
    assert batch.video_labels.tolist() == [[False, True, True, False]] * 40
    named = Counter(batch.text_labels.int().argmax(dim=1).tolist())
    assert sorted(named) == [1, 2]
    assert batch.text_labels.sum(dim=1).tolist() == [1] * 40


def test_the_number_of_workers_changes_nothing() -> None:
    asked = keys(sharding=Sharding(4))
    assert same(load(asked), load(asked, workers=2))


def test_loading_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load(keys(sharding=Sharding(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_in_the_place_of_another_is_told() -> None:
    batch = load([[SampleKey(3, 0), SampleKey(5, 0)]], unreadable=[3])[0]
    assert batch.asked.tolist() == [3, 5]
    assert batch.given.tolist() == [4, 5]
