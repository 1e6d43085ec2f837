"""A config of a stranger writes below the run's folder and nowhere else, unless the command line asks for it."""

import json
import os
from pathlib import Path

import pytest
import yaml
from running import Runner

DEBUG = "configs/debug/policy.yaml"
FAST = ("--trainer.max_steps", "1", "--trainer.limit_val_batches", "0")


@pytest.fixture
def place(p3o):
    """The folder that the command runs in has a neighbour; both are snapshotted."""
    work = p3o.folder / "here"
    work.mkdir()
    os.chdir(work)
    (work / "configs").symlink_to(Path(__file__).parent.parent / "configs")
    return Place(p3o)


class Place:
    """A folder to run in, and what a run wrote outside of its own."""

    def __init__(self, p3o: Runner) -> None:
        self.p3o, self.top = p3o, p3o.folder
        self.before = self.files()

    def files(self) -> set[str]:
        return {path.relative_to(self.top).as_posix() for path in self.top.rglob("*") if "__pycache__" not in path.parts}

    def config(self, **sections: object) -> str:
        (self.top / "here/mine.yaml").write_text(yaml.safe_dump(sections))
        self.before = self.files()
        return "mine.yaml"

    def run(self, *more: object, command: str = "fit", root: str = "run"):
        ended = self.p3o(command, "--config", DEBUG, "--trainer.default_root_dir", root, *FAST, *more)
        self.outside = {name for name in self.files() - self.before if not name.startswith("here/run")}
        return ended

    def refused(self, *more: object, **options: str) -> str:
        message = self.run(*more, **options).error
        assert self.files() == self.before, self.files() - self.before
        return message


def callback(kind: str, **arguments: object) -> dict[str, object]:
    return {"trainer": {"callbacks": [{"class_path": kind, "init_args": arguments}]}}


def logger(kind: str, **arguments: object) -> dict[str, object]:
    return {"trainer": {"logger": {"class_path": kind, "init_args": arguments}}}


def profiler(**arguments: object) -> dict[str, object]:
    return {"trainer": {"profiler": {"class_path": "lightning.pytorch.profilers.SimpleProfiler", "init_args": arguments}}}


OUTSIDE = {
    "checkpoint": ("checkpoint.dirpath", {"checkpoint": {"dirpath": "../escaped"}}),
    "checkpoint beside": ("checkpoint.dirpath", {"checkpoint": {"dirpath": "running"}}),  # begins like the run's folder
    "checkpoint absolute": ("checkpoint.dirpath", {"checkpoint": {"dirpath": "/tmp/p3o_escaped"}}),
    "checkpoint through": ("checkpoint.dirpath", {"checkpoint": {"dirpath": "run/../../escaped"}}),
    "checkpoint at home": ("checkpoint.dirpath", {"checkpoint": {"dirpath": "~/p3o_escaped"}}),
    "export": ("export.dirpath", {"export": {"dirpath": "../escaped"}}),
    "export here": ("export.dirpath", {"export": {"dirpath": "."}}),
    "finite": ("finite.dirpath", {"finite": {"dirpath": "../escaped"}}),
    "predictions": ("trainer.callbacks.path", callback("PredictionWriter", path="../escaped.jsonl")),
    "ModelCheckpoint": ("trainer.callbacks.dirpath", callback("ModelCheckpoint", dirpath="../escaped")),
    "a file's name": ("trainer.callbacks.filename", callback("ModelCheckpoint", filename="../../escaped")),
    "an absolute name": ("trainer.callbacks.filename", callback("ModelCheckpoint", filename="/tmp/p3o_escaped")),
    "one callback alone": (
        "trainer.callbacks.path",
        {"trainer": {"callbacks": callback("PredictionWriter", path="../x")["trainer"]["callbacks"][0]}},
    ),  # type: ignore[index]
    "TensorBoard": ("trainer.logger.save_dir", logger("TensorBoardLogger", save_dir="../escaped")),
    "TensorBoard's name": ("trainer.logger.name", logger("TensorBoardLogger", save_dir="run", name="../../escaped")),
    "TensorBoard's version": ("trainer.logger.version", logger("TensorBoardLogger", save_dir="run", version="../../../escaped")),
    "TensorBoard's sub_dir": ("trainer.logger.sub_dir", logger("TensorBoardLogger", save_dir="run", sub_dir="../../../../escaped")),
    "CSV": ("trainer.logger.save_dir", logger("CSVLogger", save_dir="file:../escaped")),
    "several loggers": ("trainer.logger.save_dir", {"trainer": {"logger": [logger("CSVLogger", save_dir="../x")["trainer"]["logger"]]}}),  # type: ignore[index]
    "profiler": ("trainer.profiler.dirpath", profiler(dirpath="../escaped", filename="x")),
    "profiler's file": ("trainer.profiler.filename", profiler(dirpath="run", filename="../../escaped")),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_config_does_not_write_outside_of_its_folder(place, name):
    key, sections = OUTSIDE[name]
    config = place.config(**sections)
    message = place.refused("--config", config)
    assert message.startswith(f"{key} is ") and "leads out of the run's folder 'run'" in message and "--write_outside true" in message


def test_a_config_cannot_ask_for_itself(place):
    for asked in (True, "true", "yes"):
        config = place.config(export={"dirpath": "../escaped"}, write_outside=asked)
        assert "out of the run's folder" in place.refused("--config", config)
    config = place.config(export={"dirpath": "../escaped"})
    assert "out of the run's folder" in place.refused("--config", config, "--write_outside", "false")
    assert "out of the run's folder" in place.refused("--config", config, "--write_outside=false")


@pytest.mark.parametrize("flag", [["--write_outside", "true"], ["--write_outside"], ["--write_outside=true"]])
def test_the_command_line_asks_for_all_of_it(place, flag):
    config = place.config(export={"dirpath": "../escaped/export"}, checkpoint={"dirpath": "../escaped/checkpoints"})
    assert place.run("--config", config, *flag).code == 0
    assert {"escaped/export/README.md", "escaped/checkpoints/last.ckpt"} <= place.outside
    ended = place.run("--config", "run/config.yaml")  # what it left behind does not ask again
    assert ended.code == 2 and "out of the run's folder" in ended.error


@pytest.mark.parametrize(
    "flags",
    [
        ["--export.dirpath", "../escaped"],
        ["--export.dirpath=../escaped"],
        ["--export", '{"dirpath": "../escaped"}'],
        ["--config", "mine.yaml", "--export.dirpath", "../escaped"],
        ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "../escaped"],
        ["--trainer.logger.class_path=CSVLogger", "--trainer.logger.init_args.save_dir=../escaped"],
        ["--trainer.logger", '{"class_path": "CSVLogger", "init_args": {"save_dir": "../escaped"}}'],
        ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=../escaped"],
    ],
    ids=" ".join,
)
def test_a_path_that_is_a_flag_is_asked_for(place, flags):
    place.config(export={"dirpath": "../elsewhere"})
    ended = place.run(*flags)
    assert ended.code == 0, ended
    assert any(name.startswith("escaped/") for name in place.outside) and not any(name.startswith("elsewhere") for name in place.outside)


def test_another_flag_of_the_same_text_asks_for_nothing(place):
    config = place.config(export={"dirpath": "../escaped"})
    for flags in (["--checkpoint.dirpath", "../escaped"], ["--trainer.callbacks", "[]"], ["--ckpt_path", "../escaped"]):
        assert place.refused("--config", config, *flags).startswith("export.dirpath is '../escaped'")
    config = place.config(**callback("PredictionWriter", path="../escaped"))
    assert "trainer.callbacks.path" in place.refused(
        "--config", config, "--trainer.limit_train_batches", "1", "--export.dirpath", "../escaped"
    )


def test_links_are_followed(place):
    work = place.top / "here"
    (work / "run").mkdir()
    (place.top / "target").mkdir()
    (work / "run/link").symlink_to(place.top / "target")
    (work / "run/loop").symlink_to(work / "run/loop")
    (work / "inside").symlink_to(work / "run")
    assert "out of the run's folder" in place.refused("--config", place.config(export={"dirpath": "run/link/x"}))
    assert "no usable path" in place.refused("--config", place.config(export={"dirpath": "run/loop/x"}))
    assert place.run("--config", place.config(export={"dirpath": "inside/x"})).code == 0
    assert (work / "run/x/README.md").exists() and not any((place.top / "target").iterdir())


def test_places_within_the_folder_are_the_configs_own(place):
    sections = {
        "checkpoint": {"dirpath": "run/kept"},
        "export": {"dirpath": "./run/../run/model"},
        "trainer": {
            "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "run", "name": "mine", "sub_dir": "a/b"}},
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": {"monitor": "objective/kl", "filename": "best-{step}"}},
                {"class_path": "PredictionWriter", "init_args": {"path": "run/said.jsonl"}},
            ],
        },
    }
    config = place.config(**sections)
    assert (ended := place.run("--config", config)).code == 0, ended
    assert not place.outside and {"kept", "model", "mine"} <= {path.name for path in (place.top / "here/run").iterdir()}
    assert place.run("--config", config, command="predict").code == 0 and (place.top / "here/run/said.jsonl").exists()


def test_what_a_command_does_not_write_it_does_not_refuse(place):
    config = place.config(export={"dirpath": "../escaped"})
    assert place.run("--config", config, command="validate").code == 0 and not place.outside
    config = place.config(**callback("PredictionWriter", path="../escaped"))
    assert place.refused("--config", config, command="predict").startswith("trainer.callbacks.path is '../escaped'")
    assert place.run("--config", config, "--write_outside", command="predict").code == 0 and place.outside == {"escaped"}


@pytest.mark.parametrize("root", ["..", "/", "../..", "../here/.."])
def test_the_folder_of_a_config_is_not_the_one_above(place, root):
    config = place.config(trainer={"default_root_dir": root})
    ended = place.p3o("fit", "--config", DEBUG, *FAST, "--config", config)
    assert f"trainer.default_root_dir is {root!r}, which holds the working folder" in ended.error
    assert place.files() == place.before


def test_a_folder_above_may_be_asked_for(place):
    assert place.p3o("fit", "--config", DEBUG, *FAST, "--trainer.default_root_dir", "..").code == 0
    assert "config.yaml" in place.files()


@pytest.mark.parametrize("path", ["zero\0byte", "a" * 300, "a/" * 3000, "~no-such-user/x"], ids=["zero", "long", "deep", "home"])
def test_what_is_no_path_is_refused(place, path):
    assert "is no usable path" in place.refused("--config", place.config(export={"dirpath": path}))
    if "\0" not in path:
        assert "is no usable path" in place.refused(root=path)


def test_the_doctor_says_it_too(place):
    config = place.config(export={"dirpath": "../escaped"})
    ended = place.p3o("doctor", "--config", DEBUG, "--config", config)
    assert "leads out of the run's folder" in ended.out + ended.err and place.files() == place.before


def test_names_of_rewards_are_no_paths(place):
    """They become tags of the dashboard, which are no names of files."""
    (place.top / "here/odd_rewards.py").write_text(
        "def climb(completions, **_): return [float(len(text)) for text in completions]\nclimb.__name__ = '../../../escaped\\x1b[31m\\n'\n"
    )
    place.before = place.files()
    ended = place.run("--model.reward_funcs", "odd_rewards.climb")
    assert ended.code == 0 and not place.outside, ended
    names = ("TensorBoardLogger", "CSVLogger")
    for name in names:
        ended = place.run("--model.reward_funcs", "odd_rewards.climb", "--trainer.logger", name, "--trainer.logger.save_dir", "run/logged")
        assert ended.code == 0 and not place.outside, ended


def test_a_columns_name_is_no_path(place):
    rows = [{"prompt": f"Why {number}?", "../../escaped": "a", "/tmp/x": 1, "rejected": " No.", "chosen": " So."} for number in range(40)]
    (place.top / "here/odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place.before = place.files()
    assert place.run("--data.path", "odd.jsonl").code == 0 and not place.outside
