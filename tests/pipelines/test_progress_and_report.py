"""What a run prints while it works and at its end."""

import io
from pathlib import Path

import pytest

from s2s_ray.pipelines import progress as module
from s2s_ray.pipelines.cluster import Resources
from s2s_ray.pipelines.progress import Progress, duration
from s2s_ray.pipelines.report import RunReport
from s2s_ray.pipelines.settings import GenerateSettings


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_every_few_seconds_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    progress = Progress(1000, done_before=100, stream=stream)
    progress.update(50, 1, 600)
    assert stream.getvalue() == ""
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    progress.update(50, 1, 600)
    progress.close()
    assert stream.getvalue().startswith("200/1000 rows (20%), ") and stream.getvalue().count("\n") == 1
    for word in ("rows/s", "tokens/s", "2 errors", "left"):
        assert word in stream.getvalue()


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    progress = Progress(10, 0, stream=stream)
    progress.update(10, 0, 60)
    progress.close()
    assert "10/10" in stream.getvalue() and "100%" in stream.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (3.2, 65, 7260, float("inf"))] == ["3 s", "1 min 05 s", "2 h 01 min", "unknown time"]


def test_report() -> None:
    report = RunReport("/out", 90, 10, {"NULL_TEXT": 10}, 100, 1200, 4.0, (("long " * 99, "short"),))
    text = str(report)
    assert report.exit_code == 3 and "25.0 rows/s, 300 tokens/s" in text and "10 rows: 10 NULL_TEXT" in text
    assert "/out/_manifest.json" in text and "-> short" in text and max(map(len, text.splitlines())) < 260
    done = RunReport("/out", 90, 0, {})
    assert done.exit_code == 0 and "0 rows generated" in str(done)


@pytest.mark.parametrize("cpus,gpus,nodes,flags,replicas", [
    (2, 0, 1, {}, (1, 1)),
    (2, 0, 1, {"num_replicas": "2"}, (2, 2)),
    (1, 0, 1, {}, (1, 1)),
    (16, 8, 1, {}, (8, 8)),
    (16, 8, 1, {"gpus_per_replica": 0.5}, (16, 16)),
    (16, 8, 1, {"device": "cpu"}, (1, 1)),
    (64, 0, 4, {"num_replicas": "1:8"}, (1, 8)),
    (2, 0, 1, {"num_replicas": "16"}, (16, 16)),
])  # fmt: skip
def test_replicas_always_leave_cpus_for_the_other_stages(
    cpus: int, gpus: int, nodes: int, flags: dict[str, str], replicas: tuple[int, int]
) -> None:
    settings = GenerateSettings(input=("in",), output="out", preset="p", **flags)  # type: ignore[arg-type]
    resources = Resources.of(settings, {"CPU": float(cpus), "GPU": float(gpus)}, nodes, 128)
    assert resources.replicas == replicas
    assert resources.replica_cpus * replicas[1] + resources.task_cpus <= cpus
    assert resources.threads is None if resources.replica_gpus else resources.threads >= 1  # type: ignore[operator]


@pytest.mark.parametrize("gpus,rows,calls", [(0, 128, 4), (1, 128, 16), (1, 4000, 8), (1, 10_000, 4)])
def test_small_units_do_not_leave_a_gpu_half_empty(gpus: int, rows: int, calls: int) -> None:
    settings = GenerateSettings(input=("in",), output="out", preset="p")
    assert Resources.of(settings, {"CPU": 8.0, "GPU": float(gpus)}, 1, rows).calls == calls


def test_the_sample_is_there() -> None:
    from s2s_ray.pipelines.command import SAMPLE

    assert len(list(Path(SAMPLE).glob("*.parquet"))) > 1
