"""Look into a repository on the Hub without fetching its files: their sizes and their headers."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.hub_errors import asking
from mergekit_bayes.checkpoint.safetensors import check_entry
from mergekit_bayes.checkpoint.sources import commit_of
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import CheckpointError


class RemoteHeader(NamedTuple):
    """The header of a safetensors file on the Hub.

    Attributes:
        name: Path in the repository.
        bytes: Size of the file.
        tensors: Dtype and shape by name.
        metadata: Its `__metadata__`.
    """

    name: str
    bytes: int
    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]


def file_sizes(ref: str, repo_type: str = "model") -> dict[str, int]:
    """Sizes of a repository's files in bytes, by path.

    Args:
        ref: `org/name[@revision]`.
        repo_type: `model` or `dataset`.

    Raises:
        CheckpointError: As `sources.resolve`.
    """
    commit, repo = commit_of(ref, repo_type), ref.partition("@")[0]
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.hf_api import RepoFile

    with asking(ref):
        if is_offline_mode():
            folder = Path(
                snapshot_download(repo, repo_type=repo_type, revision=commit, allow_patterns=["-"])
            )
            files = (path for path in folder.rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        tree = HfApi().list_repo_tree(repo, repo_type=repo_type, revision=commit, recursive=True)
        return {file.path: file.size for file in tree if isinstance(file, RepoFile)}


def read_headers(ref: str, names: tuple[str, ...]) -> tuple[RemoteHeader, ...]:
    """Headers of safetensors files, read by ranged requests: no tensor is read, nothing is stored.

    Args:
        ref: `org/name[@revision]`.
        names: Paths in the repository.

    Raises:
        CheckpointError: As `sources.resolve`.
    """
    sizes, repo, commit = file_sizes(ref), ref.partition("@")[0], commit_of(ref)
    from huggingface_hub import HfApi

    headers = []
    for name in names:
        with asking(ref):
            header = HfApi().parse_safetensors_file_metadata(repo, name, revision=commit)
        metadata, place = header.metadata or {}, Path(f"{repo}@{commit}") / name
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CheckpointError(f"{place}: its __metadata__ is not text by name.")
        tensors = {}
        for tensor, info in header.tensors.items():
            entry = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [*info.data_offsets]}
            tensors[tensor], _, _ = check_entry(tensor, entry, place)
        headers.append(RemoteHeader(name, sizes[name], tensors, dict(metadata)))
    return tuple(headers)
