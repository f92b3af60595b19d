"""Downloads, whose errors become one sentence for all libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..errors import first_line


def download(make: Callable[[], Any], name: str) -> Any:
    """Returns `make()`, which may download; if it cannot, raises an error of one sentence.

    Raises:
        RuntimeError: no hub was reached.
        ValueError: a hub was reached and has no such model.
    """
    try:
        return make()
    except Exception as error:
        causes = list(_causes(error))
        if any(_answered(cause) for cause in causes):
            raise ValueError(
                f"the hub has no {name!r} that can be read: {first_line(error)}"
            ) from error
        if any(_unreachable(cause) for cause in causes):
            raise RuntimeError(
                f"{name!r} must be downloaded and the hub could not be reached; connect to the "
                "network, or give a local file: load_backbone(..., weights='file.safetensors')"
            ) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _answered(error: BaseException) -> bool:
    """Whether the error is an HTTP status, of urllib or of huggingface_hub."""
    return hasattr(error, "code") or getattr(error, "response", None) is not None


def _unreachable(error: BaseException) -> bool:
    library = type(error).__module__.partition(".")[0]
    clients = ("httpcore", "httpx", "huggingface_hub", "requests", "urllib3", "urllib", "socket")
    return isinstance(error, ConnectionError) or library.startswith(clients)
