"""kaggle://org/model/framework/variation[/version] through kagglehub, its cache and its credentials (KAGGLE_*)."""

from pathlib import Path

from s2s_ray.errors import InfrastructureError, PresetError
from s2s_ray.presets.huggingface import first_line


def download(model: str) -> Path:
    """The model's directory in kagglehub's cache (KAGGLEHUB_CACHE); without a version the newest.

    Raises PresetError when kagglehub is not installed or Kaggle refuses the model, InfrastructureError when it cannot
    be reached.
    """
    try:
        import kagglehub
        from kagglehub import exceptions
        from requests import RequestException
    except ImportError as error:
        raise PresetError(
            f"kaggle:// presets need kagglehub: pip install 's2s_ray[keras]'. Received: {model}"
        ) from error
    try:
        return Path(kagglehub.model_download(model))
    except exceptions.KaggleApiHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if 400 <= status < 500 and status != 429:
            raise PresetError(
                f"Kaggle has no model {model} that these KAGGLE_* credentials may read: {first_line(error)}"
            ) from error
        raise InfrastructureError(f"kaggle://{model} cannot be fetched: {first_line(error)}") from error
    except (exceptions.DataCorruptionError, RequestException, OSError) as error:
        raise InfrastructureError(f"kaggle://{model} cannot be fetched: {first_line(error)}") from error
