"""Rules on the Hugging Face hub: ``hf://OWNER/NAME`` in place of a path."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

PREFIX = "hf://"
DEFAULT_FILE = "rule.safetensors"
"""The file of a repository that holds its rule, unless the address names another."""

_ADDRESS = re.compile(rf"{PREFIX}(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")

CARD = """---
library_name: learned-optim
tags: [learned-optimizer, pytorch]
---

# {repository}

A meta-trained update rule for PyTorch ({architecture}).

```python
from learned_optim import LearnedOptimizer

optimizer = LearnedOptimizer(model.parameters(), rule="{address}")
```

Needs `pip install 'learned-optim[hub]'`; `learned-optim rules show {address}` says how it came about.
"""


class Address(NamedTuple):
    """A file on the hub, ``hf://OWNER/NAME[@REVISION][/FILE]``."""

    repository: str
    revision: str | None
    file: str


def is_address(source: object) -> TypeGuard[str]:
    """Whether this names a place on the hub."""
    return isinstance(source, str) and source.startswith(PREFIX)


def parse(source: str) -> Address:
    """The parts of an address; raises a ``ValueError`` if the text is no address."""
    match = _ADDRESS.fullmatch(source)
    if match is None:
        raise ValueError(f"{source!r} is no address on the hub: expected hf://OWNER/NAME[@REVISION][/FILE.safetensors]")
    return Address(match["repository"], match["revision"], match["file"] or DEFAULT_FILE)


def download(source: str) -> Path:
    """The file, in the cache that all users of the hub share.

    Raises:
        ValueError: this is no address.
        ImportError: huggingface_hub is not installed.
        OSError: there is no such file, or no network.
    """
    address = parse(source)
    hub = _library(source)
    with _as_os_error(f"cannot load {source}"):
        return Path(hub.hf_hub_download(address.repository, address.file, revision=address.revision))


def upload(target: str, content: bytes, architecture: str) -> None:
    """Write a rule's file, and a model card where there is none; a new repository has the account's usual visibility.

    Raises:
        ValueError: this is no address.
        ImportError: huggingface_hub is not installed.
        OSError: no permission (``hf auth login``), or no network.
    """
    address = parse(target)
    api = _library(target).HfApi()
    files = {address.file: content}
    with _as_os_error(f"cannot save {target}"):
        api.create_repo(address.repository, exist_ok=True)
        if not api.file_exists(address.repository, "README.md", revision=address.revision):
            card = CARD.format(repository=address.repository, architecture=architecture, address=target)
            files["README.md"] = card.encode()
        for file, data in files.items():
            api.upload_file(
                path_or_fileobj=data,
                path_in_repo=file,
                repo_id=address.repository,
                revision=address.revision,
                commit_message=f"Add {file}",
            )


def _library(address: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"{address} needs huggingface_hub: pip install 'learned-optim[hub]'") from error
    return huggingface_hub


@contextmanager
def _as_os_error(what: str) -> Iterator[None]:
    """Turn any error on the way to the hub into an ``OSError`` of one line."""
    try:
        yield
    except Exception as error:  # of several libraries, without a common base
        lines = str(error).strip().splitlines()
        raise OSError(f"{what}: {lines[0] if lines else type(error).__name__}") from error
