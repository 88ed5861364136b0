"""TensorRT and TensorRT for RTX: engines that are built, verified, audited and run.

Building
    profiles.py      the batch sizes that an engine is for
    builder.py       from an ONNX file to a plan
    building.py      from a bundle to engines that are kept and examined
    engine_store.py  where engines are kept; engine_entries.py: keys and records
    places.py        the machine as far as an engine depends on it
    refit.py         another fine-tune's weights in a stripped engine

Running
    api.py           loads TensorRT, and says why it cannot be had
    driver.py        CUDA: device, memory, streams, recorded work
    messages.py      what TensorRT says while it works
    engine.py        an engine that runs; lanes.py: one of its profiles
    runtime.py       the runtime of a bundle

Trusting
    verification.py  agreement with PyTorch on this card, and the audit
    audit.py         in which precision an engine computes: inspector.py, products.py
    faults.py        which part of which graph is wrong: bisect.py, boundaries.py, trials.py
    repair.py        other forms of a graph that is wrong

Graphs
    onnx_graphs.py   reading, writing and changing them
    rewrites.py      their other forms: attention_rewrites.py, precision_rewrites.py, attentions.py
    rewritten.py     the graph that an engine is built from
"""
