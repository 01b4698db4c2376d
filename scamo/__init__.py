"""ScaMo: text in, human motion out.

`ScaMo.load(folder).generate("a person walks in a circle")` is the short way; see README.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scamo.generation.api import ScaMo

__version__ = "0.1.0"
__all__ = ["ScaMo", "__version__"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `scamo --help` must not wait for it.
    if name == "ScaMo":
        from scamo.generation.api import ScaMo

        return ScaMo
    raise AttributeError(f"module 'scamo' has no attribute {name!r}")
