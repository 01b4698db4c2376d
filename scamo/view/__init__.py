"""The interactive pages; all of it needs viser (the extra scamo[view])."""

from scamo.errors import ScaMoError

try:
    import viser as _  # noqa: F401
except ImportError as error:
    raise ScaMoError("the page needs viser, which is not installed: pip install 'scamo[view]'") from error
