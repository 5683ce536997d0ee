"""The tasks of lm-evaluation-harness, without the network, and its results as text.

Needs the extra [eval].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from minqwen.checks import did_you_mean
from minqwen.engine.failures import described
from minqwen.errors import MinqwenError
from minqwen.lab.evaluate import EngineLM


class Tasks(TaskManager):  # type: ignore[misc]  # lm_eval is not there when types are checked
    """The tasks that were asked for, with their data, which are loaded when this is made.

    names: of the harness's own tasks, groups and tags, of those in `include_path`, or YAML files.
    The harness's own are read only where a name is not found without them: there are thousands.
    Raises MinqwenError for what cannot be loaded, in one line.
    """

    def __init__(self, names: Sequence[str], include_path: str | None = None):
        if include_path is not None and not Path(include_path).is_dir():
            raise MinqwenError(f"--include-path {include_path}: expected a directory of task files")
        super().__init__(include_path=include_path, include_defaults=False)
        own = list(self.all_tasks)
        if not all(map(self.knows, names)):
            super().__init__(include_path=include_path)
        self.names = list(names)
        for name in names:
            if not self.knows(name):
                near = did_you_mean(name, own) or did_you_mean(name, self.all_tasks)
                raise MinqwenError(f"--tasks {name}: there is no such task, nor file{near}")
        try:
            self.found = super().load(self.names)
        except Exception as error:  # whatever is in a task's files
            raise MinqwenError(f"--tasks {','.join(names)}: {_why(error)}") from error

    def knows(self, name: str) -> bool:
        return name in self.task_index or Path(name).is_file()

    def load(self, task_list: object) -> Any:
        """What was loaded already: the harness asks for it after the model is there."""
        return self.found


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        what = " ".join(str(error).split())
        return f"the data cannot be read ({what}); the network is not used: bring them first"
    return described(error)


def evaluate(lm: EngineLM, tasks: Tasks, seed: int = 1234, **options: Any) -> dict[str, Any]:
    """The harness's results. options: those of its `simple_evaluate`."""
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    found: dict[str, Any] = simple_evaluate(
        lm, tasks=tasks.names, task_manager=tasks, **dict.fromkeys(seeds, seed), **options
    )
    return found


def as_table(results: dict[str, Any]) -> str:
    """The harness's own table, and that of its groups."""
    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)


def as_json(results: dict[str, Any], samples: bool = False) -> str:
    """The harness's results; samples: with each question, and what the model made of it."""
    kept = {name: value for name, value in results.items() if samples or name != "samples"}
    return json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False)
