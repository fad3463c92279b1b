"""What happens between the Trainer's steps: gates, the freeze point, metrics.jsonl, the progress bar, signals."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from prunetune.core.console import console, is_main_process
from prunetune.core.errors import TerminatedError
from prunetune.core.files import write_text


class JointCallback(TrainerCallback):
    """Lets the joint trainer act at the right moments of a step; the trainer does the work."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_leg(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_step(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.before_optimizer_step(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._trainer.after_optimizer_step(state.global_step, float(optimizer.param_groups[0]["lr"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.stop_after(state.global_step):
            control.should_save = control.should_training_stop = True
        if control.should_save:
            # What is averaged since the last log is not in a checkpoint, so a checkpoint always comes with a log.
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            control.should_log = True


class MetricsFile(TrainerCallback):
    """``metrics.jsonl``: one JSON object a log, across the freeze and across resumptions."""

    def __init__(self, path: Path, facts: Callable[[], dict[str, Any]]):
        self._path, self._facts = path, facts
        self._last = time.monotonic()
        self._last_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last, self._last_step = time.monotonic(), state.global_step
        if is_main_process() and self._path.exists():
            write_text(self._path, "".join(f"{line}\n" for line in _until(self._path, state.global_step)))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not is_main_process():
            return
        entry = {"step": state.global_step, **self._facts(), **(logs or {})}
        if "loss" in entry and state.global_step > self._last_step:
            now = time.monotonic()
            entry["step_seconds"] = round((now - self._last) / (state.global_step - self._last_step), 4)
            self._last, self._last_step = now, state.global_step
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _until(path: Path, step: int) -> list[str]:
    """The lines of up to ``step`` steps; of what was logged twice (a crash in the freeze), the later one."""
    kept: dict[Any, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            # Preparing the model takes time only in the first evaluation of a process.
            key = (float(entry["step"]), frozenset(name for name in entry if not name.endswith("_time")))
        except (ValueError, KeyError, TypeError):
            continue  # cut short by a crash
        if key[0] <= step:
            kept.pop(key, None)
            kept[key] = line
    return list(kept.values())


class ProgressBar(TrainerCallback):
    """One bar for the whole run: phase, loss, kept fraction, time left."""

    def __init__(self, facts: Callable[[], dict[str, Any]]):
        self._facts = facts
        self._loss = ""
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None or not is_main_process() or args.disable_tqdm:
            return
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        self._bar = Progress(*columns, console=console(), redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task("starting", total=state.max_steps, completed=state.global_step, shown="")
        self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._loss = f"loss {logs['loss']:.3f} "
            self._update(state)
            now_and_then = state.global_step % max(1, state.max_steps // 10) == 0
            # A log file gets a line now and then instead of a bar that redraws itself.
            if (
                self._bar is not None
                and not console().is_terminal
                and (now_and_then or state.global_step == state.max_steps)
            ):
                console().print(f"step {state.global_step}/{state.max_steps}  {self._shown()}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(state)

    def _update(self, state: Any) -> None:
        if self._bar is not None:
            phase = self._facts().get("phase", "train")
            self._bar.update(self._task, completed=state.global_step, description=phase, shown=self._shown())

    def _shown(self) -> str:
        kept = self._facts().get("kept_fraction")
        return f"{self._loss}kept {100 * kept:.0f}%" if kept is not None else self._loss

    def close(self) -> None:
        """Takes the bar down, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Interruption:
    """Turns Ctrl-C and SIGTERM into a request to save and stop after the current step."""

    def __init__(self) -> None:
        self.requested = False
        self._terminated = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self.requested = self._terminated = False
        # Signals can only be handled in the main thread; elsewhere they keep their meaning.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """Sends this process the SIGTERM anew that came too late for a step to stop at."""
        if self._terminated:
            os.kill(os.getpid(), signal.SIGTERM)

    def error(self, text: str) -> KeyboardInterrupt:
        """What to raise once everything is saved: TerminatedError if it was SIGTERM."""
        terminated, self._terminated = self._terminated, False
        return TerminatedError(text) if terminated else KeyboardInterrupt(text)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            # The second time is meant: stop at once, the last checkpoint stays.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True
        self._terminated |= number == signal.SIGTERM
        console().print("\n[yellow]![/yellow] stopping after this step and saving; once more stops at once")
