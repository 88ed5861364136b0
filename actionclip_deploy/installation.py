"""How this package was installed, as the command that adds an extra to it.

    >>> install_command("serve")
    'pip install "actionclip-deploy[serve]"'

Where the package is installed, from whatever, pip and uv take it as it is and add what the extra
needs; no index has to know it. A checkout is named by its path, because it may be on the path of
imports alone, and because its extras change without a new installation.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

NAME = "actionclip-deploy"

_ROOT = Path(__file__).resolve().parents[1]
# A shell reads these between double quotes too.
_SPECIAL = frozenset('"$`\\!')


def install_command(extra: str, *, root: Path = _ROOT) -> str:
    """The command that brings an extra into the environment of this interpreter.

    Args:
        extra: Or several with commas between them.
        root: The folder that holds the package's; a checkout, or site-packages.
    """
    if _is_checkout(root):
        return f"{pip_install()} -e {_quote(f'{root}[{extra}]')}"
    return f"{pip_install()} {_quote(f'{NAME}[{extra}]')}"


def _is_checkout(root: Path) -> bool:
    try:
        text = (root / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return f'name = "{NAME}"' in text.splitlines()


def pip_install() -> str:
    """`pip install` where that is this environment's, which is not active in every shell."""
    from importlib.util import find_spec

    found = shutil.which("pip")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return "pip install"
    python = _quote(sys.executable, always=False)
    if find_spec("pip") is not None:
        return f"{python} -m pip install"
    return f"uv pip install --python {python}"  # which makes environments without pip


def _quote(word: str, *, always: bool = True) -> str:
    if _SPECIAL.intersection(word):
        return shlex.quote(word)
    return f'"{word}"' if always or shlex.quote(word) != word else word
