"""hf://org/name[@revision] through huggingface_hub and its cache (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE)."""

from pathlib import Path

from s2s_ray.errors import InfrastructureError, PresetError
from s2s_ray.presets import keras
from s2s_ray.storage import Location

# Never *.bin, *.msgpack or Python files. "*" also matches "/", hence the second list.
_ALLOWED = ["*.json", "*.txt", "*.safetensors", "*.model", "*.spm", "*.md"]
_IGNORED = ["*/*"]
_KERAS = ["model.weights.h5", "model_?????.weights.h5", "assets/tokenizer/*"]  # besides, in a KerasHub repository


def download(repository: str, revision: str | None = None) -> Path:
    """The snapshot's directory in the hub's cache: configuration, tokenizer and weights of the repository.

    Raises PresetError when there is no such repository or revision (or no right to read it), InfrastructureError when
    the hub cannot be reached and the snapshot is not cached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        path = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=_ALLOWED, ignore_patterns=_IGNORED
        )
        if keras.is_keras(Location.parse(path)):
            path = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=_KERAS)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        at = f" at {revision}" if revision else ""
        raise PresetError(
            f"the hub has no repository {repository}{at} that this HF_TOKEN may read: {first_line(error)}"
        ) from error
    except (OSError, errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
        raise InfrastructureError(
            f"hf://{repository} cannot be fetched and is not cached: {first_line(error)}"
        ) from error
    return Path(path)


def first_line(error: Exception) -> str:
    """The first line of an error's message, else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
