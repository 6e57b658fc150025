"""From a command line to an exit code: what the scripts in jobs/ share."""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from s2s_ray import presets
from s2s_ray.errors import EXIT_OK, InfrastructureError, S2SRayError
from s2s_ray.pipelines.settings import GenerateSettings, parse

SAMPLE = Path(__file__).parent.parent / "samples" / "package_descriptions"
TRANSLATION_SAMPLE = SAMPLE.with_name("package_translations")


def main(job: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `job` on the arguments and exit with its code; an expected error is one line on stderr, no traceback."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = job(sys.argv[1:] if argv is None else argv)
    except S2SRayError as error:
        code = _say(str(error), error.exit_code)
    except OSError as error:
        code = _say(f"storage failed: {error}", InfrastructureError.exit_code)
    except KeyboardInterrupt:
        code = _say("interrupted; run the same command again to resume", 128 + signal.SIGINT)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else _say(str(stop.code), 1)
    if argv is None:  # a script, not a caller that goes on
        _leave(code)
    sys.exit(code)


def generate(argv: Sequence[str], description: str, defaults: dict[str, Any]) -> int:
    """Parse the flags, run the job, print the report; returns the exit code."""
    from s2s_ray.pipelines.generate import run

    report = run(parse(argv, description, defaults))
    print(report, flush=True)
    return report.exit_code


def finetune(argv: Sequence[str], description: str) -> int:
    """Parse the flags, train, print the report; returns the exit code."""
    from s2s_ray.pipelines import finetune_settings
    from s2s_ray.pipelines.finetune import run

    print(run(finetune_settings.parse(argv, description, {})), flush=True)
    return EXIT_OK


def evaluate(argv: Sequence[str], description: str) -> int:
    """Parse the flags, generate and score, print the figures; returns the exit code."""
    from s2s_ray.pipelines import evaluate as job

    evaluation = job.run(job.parse(argv, description, {}))
    print(evaluation, flush=True)
    return evaluation.exit_code


def summarize_defaults(argv: Sequence[str]) -> dict[str, Any]:
    """The built-in summariser; and without any input the sample that ships with the package."""
    sample = {"input": (str(SAMPLE),), "text_column": "description", "output": "out/summaries"}
    return {"preset": presets.DEFAULT_SUMMARIZER, **({} if _has_input(argv) else sample)}


def translate_defaults(argv: Sequence[str]) -> dict[str, Any]:
    """The built-in translator, sentence by sentence; and without any input the sample that ships, to German."""
    defaults = {"preset": presets.DEFAULT_TRANSLATOR, "segment": "sentence", "summary_column": "translation"}
    sample = {"input": (str(TRANSLATION_SAMPLE),), "text_column": "description", "output": "out/translations"}
    return {**defaults, **({} if _has_input(argv) else sample)}


def _has_input(argv: Sequence[str]) -> bool:
    return any(argument.partition("=")[0] in ("--input", "--config") for argument in argv)


def parse_summarize(argv: Sequence[str]) -> GenerateSettings:
    """The settings jobs/summarize.py would run with."""
    return parse(argv, "", summarize_defaults(argv))


def _leave(code: int) -> NoReturn:
    """Exit with `code`, whatever threads of Ray and Arrow still run: one that asks for the GIL while the interpreter
    ends aborts the process before Python 3.14 (python/cpython#87135), and 134 would hide that the job was done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    print("terminated; run the same command again to resume", file=sys.stderr, flush=True)
    raise SystemExit(128 + signum)
