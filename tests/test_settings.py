"""Reading settings: merging, provenance, faults, help, on toy settings classes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field, model_validator

from ppojax.component import Component
from ppojax.errors import ConfigError
from ppojax.settings import Contradiction, Settings, help_text, load_config


class Penalty(Component):
    """A penalty."""

    coefficient: float = Field(0.0, ge=0, description="Its weight.")
    kind: Literal["k1", "k3"] = Field("k3", description="Its estimator.")


class Wide(Component):
    """A loss with a width."""

    type: Literal["wide"] = "wide"
    width: float = Field(0.2, gt=0, le=1, description="Half width of the region.")
    cap: float = Field(5.0, gt=0, allow_inf_nan=True, description="Largest ratio.")
    penalty: Penalty = Field(Penalty(), description="Added to the loss.")


class Narrow(Component):
    """A loss with a clip."""

    type: Literal["narrow"] = "narrow"
    clip: float = Field(0.1, gt=0, description="Clip of the ratio.")


class Optimizer(Component):
    """How weights move."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate.")
    steps: int = Field(10, ge=1, description="Steps.")
    warmup: int = Field(0, ge=0, description="Steps of warm-up.")

    @model_validator(mode="after")
    def _ordered(self) -> Optimizer:
        if self.warmup > self.steps:
            raise ValueError(f"warmup {self.warmup} is longer than steps {self.steps}")
        return self


class Source(Component):
    """Needs a path."""

    path: str = Field(description="A folder.")


class Root(Settings):
    """A toy."""

    foreign_keys: ClassVar[dict[str, str]] = {"trainer.lr": "actor.learning_rate"}

    seed: int = Field(0, ge=0, description="Seed of the run.")
    name: str | None = Field(None, description="Name of the run.")
    whiten: Literal["off", "batch"] = Field("off", description="Whitening.")
    resume: bool | Literal["strict"] = Field(False, description="Go on with a run.")
    sizes: tuple[int, ...] = Field((1, 2), description="Sizes.")
    actor: Optimizer = Field(Optimizer(), description="The actor.")
    critic: Optimizer = Field(Optimizer(learning_rate=1e-5), description="The critic.")
    loss: Annotated[Wide | Narrow, Field(discriminator="type")] = Field(Wide(width=0.3), description="The loss.")
    warm: Optimizer | None = Field(None, description="A warm start.")
    source: Source | None = Field(None, description="Where from.")

    def contradictions(self) -> Iterable[Contradiction]:
        """The seed bounds the steps."""
        if self.seed > self.actor.steps:
            yield Contradiction(("seed", "actor.steps"), "the seed is over the steps", "lower seed")


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def faults(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(Root, arguments, flags=("--help", "--dry-run"))
    return str(caught.value).splitlines()


def config(*arguments: str) -> Root:
    return load_config(Root, arguments).config


# ---- values


def test_files_are_merged_left_to_right_and_arguments_win(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "seed: 1\nactor: {learning_rate: 1e-3, steps: 5}\n")
    b = write(tmp_path, "b.yaml", "# a comment\nseed: 2\nactor:\n  steps: 6\n")
    read = config(f"config={a},{b}", "actor.warmup=3")
    assert (read.seed, read.actor) == (2, Optimizer(learning_rate=1e-3, steps=6, warmup=3))
    assert config(f"config={b}", f"config={a}").seed == 1
    assert config("seed=4", f"config={a}").seed == 4


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001", "1E-6"])
def test_scientific_notation_is_a_float(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, "a.yaml", f"actor:\n  learning_rate: {text}\n")
    assert config(f"config={file}").actor.learning_rate == 1e-6
    assert config(f"actor.learning_rate={text}").actor.learning_rate == 1e-6


def test_values_from_the_command_line() -> None:
    read = config("sizes=[3,4]", "resume=strict", "loss.cap=inf", "name=hello world", "warm.steps=3")
    assert (read.sizes, read.resume, read.name) == ((3, 4), "strict", "hello world")
    assert isinstance(read.loss, Wide) and math.isinf(read.loss.cap)
    assert read.warm == Optimizer(steps=3)
    assert config("warm.steps=3", "warm=null").warm is None
    assert config("warm={}").warm == Optimizer()
    assert config("resume=true").resume is True
    assert config("name=").name is None


@pytest.mark.parametrize("text", ["2024", "1e3", "on", "0x10", "no"])
def test_a_text_setting_keeps_what_was_written(tmp_path: Path, text: str) -> None:
    assert config(f"name={text}").name == text
    assert config(f"config={write(tmp_path, 'a.yaml', f'name: {text}')}").name == text


def test_a_literal_that_yaml_reads_as_a_boolean() -> None:
    assert config("whiten=off").whiten == "off"


def test_references_between_settings() -> None:
    assert config("seed=3", "actor.steps=${seed}", "name=run ${seed}").name == "run 3"
    assert config("seed=3", "name=${seed}").name == "3"
    assert config(r"name=\${seed}").name == "${seed}"


def test_defaults_of_an_enclosing_section_hold() -> None:
    assert config("critic.steps=3").critic == Optimizer(learning_rate=1e-5, steps=3)
    assert config("loss.cap=2").loss == Wide(width=0.3, cap=2.0)
    assert config("loss.type=wide").loss == Wide(width=0.3)


def test_another_variant_drops_the_defaults_of_the_first() -> None:
    assert config("loss.type=narrow").loss == Narrow()
    assert config("loss={type: narrow, clip: 0.5}").loss == Narrow(clip=0.5)


def test_the_result_is_hashable() -> None:
    assert hash(config("sizes=[3]")) == hash(config("sizes=[3]"))


# ---- faults


def test_an_unknown_key_names_the_nearest() -> None:
    [line] = faults("actor.learning_rte=1")
    assert line == "unknown key actor.learning_rte (command line); did you mean actor.learning_rate?"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sed", "seed"),
        ("loss.widht", "loss.width"),
        ("width", "loss.width"),
        ("critc.warmup", "critic.warmup"),
        ("actor.optimizer.learning_rate", "actor.learning_rate"),
        ("seed.x", "seed"),
        ("warm.step", "warm.steps"),
        ("trainer.lr", "actor.learning_rate"),
    ],
)
def test_nearest_keys(key: str, nearest: str) -> None:
    [line] = faults(f"{key}=1")
    assert line == f"unknown key {key} (command line); did you mean {nearest}?"


def test_an_unknown_key_far_from_all() -> None:
    assert faults("qqqq=1") == ["unknown key qqqq (command line); --help lists the keys"]


def test_an_unknown_section_is_one_fault(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "seed: 1\nactr:\n  steps: 2\n  warmup: 1\n")
    assert faults(f"config={file}") == [f"unknown key actr ({file}:3); did you mean actor?"]


def test_a_key_of_another_variant(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "loss:\n  width: 0.5\n  penalty:\n    coefficient: 1\n  type: narrow\n")
    advice = "it belongs to loss.type=wide, not to loss.type=narrow: remove it, or change the type"
    assert faults(f"config={file}") == [
        f"unknown key loss.width ({file}:2); {advice}",
        f"unknown key loss.penalty.coefficient ({file}:4); {advice}",
    ]
    assert faults("loss.width=0.5", "loss.type=narrow") == [f"unknown key loss.width (command line); {advice}"]


def test_another_type_leaves_keys_of_the_first_behind(tmp_path: Path) -> None:
    """Those that it does not have; a misspelled one is told all the same, and one written beside or after the type."""
    wide = "loss:\n  type: wide\n  width: 0.5\n  penalty:\n    coefficient: 1\n"
    first = write(tmp_path, "a.yaml", wide)
    second = write(tmp_path, "b.yaml", "loss:\n  type: narrow\n  clip: 0.5\n")
    assert config(f"config={first},{second}").loss == Narrow(clip=0.5)
    assert config(f"config={first}", "loss.type=narrow").loss == Narrow()
    advice = "it belongs to loss.type=wide, not to loss.type=narrow: remove it, or change the type"
    late = faults(f"config={first},{second}", "loss.width=1")
    assert late == [f"unknown key loss.width (command line); {advice}"]
    wrong = write(tmp_path, "c.yaml", "loss:\n  type: wide\n  widht: 0.5\n")
    [line] = faults(f"config={wrong},{second}")
    assert line.startswith(f"unknown key loss.widht ({wrong}:3)")
    default = write(tmp_path, "e.yaml", "loss:\n  width: 0.5\n")
    assert config(f"config={default}").loss.width == 0.5
    assert config(f"config={default},{second}").loss == Narrow(clip=0.5)
    back = write(tmp_path, "d.yaml", "loss:\n  type: wide\n")
    assert config(f"config={default},{back}").loss.width == 0.5
    assert config(f"config={first},{second},{back}").loss.width == 0.5


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("seed=-1", "int >= 0"),
        ("seed=1.5", "int >= 0"),
        ("seed=true", "int >= 0"),
        ("seed=null", "int >= 0"),
        ("seed=abc", "int >= 0"),
        ("actor.learning_rate=0", "float > 0"),
        ("actor.learning_rate=-1e-6", "float > 0"),
        ("actor.learning_rate=fast", "float > 0"),
        ("actor.learning_rate=nan", "finite float > 0"),
        ("actor.learning_rate=.nan", "finite float > 0"),
        ("actor.learning_rate=inf", "finite float > 0"),
        ("loss.width=2", "float > 0 and <= 1"),
        ("loss.cap=nan", "float > 0 and up to inf"),
        ("resume=maybe", "bool | strict"),
        ("whiten=on", "off | batch"),
        ("sizes=3", "list of int"),
        ("sizes=[a]", "list of int"),
        ("loss.type=wde", "wide | narrow"),
        ("loss=null", "wide | narrow"),
        ("loss.penalty.kind=k9", "k1 | k3"),
    ],
)
def test_a_value_that_cannot_be_used(argument: str, expected: str) -> None:
    assert faults(argument) == [f"{argument} (command line): expected {expected}"]


def test_the_file_and_line_of_a_fault(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "seed: 1\n\nactor:\n  # lr\n  learning_rate: nan\n")
    assert faults(f"config={file}") == [f"actor.learning_rate=nan ({file}:5): expected finite float > 0"]


def test_a_section_given_as_a_value() -> None:
    assert faults("loss=narrow") == ["loss=narrow (command line): loss is a section; write loss.type=narrow"]
    assert faults("actor=3") == ["actor=3 (command line): actor is a section; write actor.<key>=..."]


def test_a_message_of_a_section_itself() -> None:
    assert faults("actor.warmup=20") == ["actor (command line): warmup 20 is longer than steps 10"]


def test_a_key_that_must_be_given() -> None:
    assert faults("source={}") == ["source.path is missing: expected str; A folder."]
    assert faults("source.pth=x") == ["unknown key source.pth (command line); did you mean source.path?"]


def test_a_value_left_open(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "name: ???\n")
    assert faults(f"config={file}") == [f"name ({file}:1) is left open: give it, name=..., as str | null"]
    assert config(f"config={file}", "name=x").name == "x"


def test_a_contradiction_names_values_and_where_they_were_written(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "seed: 30\n")
    line = f"seed=30 ({file}:1), actor.steps=10 (default): the seed is over the steps; lower seed"
    assert faults(f"config={file}") == [line]


def test_a_contradiction_in_python() -> None:
    with pytest.raises(ConfigError, match=r"^seed=30, actor\.steps=10: the seed is over the steps; lower seed$"):
        Root(seed=30)


def test_all_faults_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "seed: 30\ncritic:\n  learning_rate: 0\nloss:\n  type: wide\n  widht: 1\n")
    assert faults(f"config={file}", "sizes=3", "resme=true", "loss.cap=0") == [
        f"unknown key loss.widht ({file}:6); did you mean loss.width?",
        "unknown key resme (command line); did you mean resume?",
        f"critic.learning_rate=0 ({file}:3): expected float > 0",
        "loss.cap=0 (command line): expected float > 0 and up to inf",
        "sizes=3 (command line): expected list of int",
        f"seed=30 ({file}:1), actor.steps=10 (default): the seed is over the steps; lower seed",
    ]


def test_nothing_is_concluded_from_a_faulty_value() -> None:
    assert faults("seed=30", "actor.stps=50") == ["unknown key actor.stps (command line); did you mean actor.steps?"]
    assert faults("seed=30", "actor.steps=x") == ["actor.steps=x (command line): expected int >= 1"]


# ---- what cannot be read


def test_duplicate_keys(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "seed: 1\nactor:\n  steps: 2\n  steps: 3\nseed: 1\n")
    assert faults(f"config={file}") == [
        f"{file}:4: duplicate key actor.steps, first given at line 3; keep one of them",
        f"{file}:5: duplicate key seed, first given at line 1; keep one of them",
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert faults("config=nosuch.yaml") == ["config=nosuch.yaml (command line): there is no such file"]
    assert faults(f"config={tmp_path}")[0].startswith(f"config={tmp_path} (command line): cannot be read: ")
    broken = write(tmp_path, "a.yaml", "seed: 1\nsizes: [1, 2\nname: x\n")
    [line] = faults(f"config={broken}")
    assert line.startswith(f"{broken}:3: not YAML: ")
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"seed: \xff\xfe\n")
    assert faults(f"config={binary}")[0].startswith(f"config={binary} (command line): cannot be read: ")
    lists = write(tmp_path, "c.yaml", "- seed\n")
    assert faults(f"config={lists}") == [f"{lists}:1: expected keys and values (key: value) at the top level"]
    dotted = write(tmp_path, "d.yaml", "actor.steps: 3\n")
    expected = f"{dotted}:1: cannot read the key 'actor.steps'; nest keys instead of joining them with dots"
    assert faults(f"config={dotted}") == [expected]
    assert config(f"config={write(tmp_path, 'e.yaml', '# nothing')}") == Root()


def test_arguments_that_cannot_be_read() -> None:
    assert faults("--sed=3", "--hepl", "-x", "foo", "=3", "sizes=[1,") == [
        "unknown flag --sed=3; values are written key=value: sed=3",
        "unknown flag --hepl; did you mean --help?",
        "unknown flag -x; flags are --help, --dry-run",
        "cannot read the argument 'foo'; expected key=value, for example run.name=first",
        "cannot read the argument '=3'; expected key=value, for example run.name=first",
        "sizes=[1, (command line): not a YAML value; quote it, or balance its brackets",
    ]


def test_references_that_cannot_be_followed() -> None:
    lines = faults("name=${x", "loss.cap=${q}", "sizes=[1]", "sizes.x=3")
    assert lines[0].startswith("name=${x (command line): ") and lines[0].endswith(r"a literal ${ is written \${")
    assert lines[1] == "sizes.x=3 (command line): puts keys where a list was given before, or a list where keys were"
    assert lines[2] == "loss.cap (command line): Interpolation key 'q' not found"


def test_merge_keys_of_yaml(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "actor: &a {steps: 3, warmup: 1}\ncritic:\n  steps: 4\n  <<: *a\n")
    loaded = load_config(Root, [f"config={file}"])
    assert loaded.config.critic == Optimizer(learning_rate=1e-5, steps=4, warmup=1)
    assert loaded.origins["critic.steps"].where == f"{file}:3"
    assert loaded.origins["critic.warmup"].where == f"{file}:1"


# ---- what is written


def test_yaml_reads_back_to_the_same_settings(tmp_path: Path) -> None:
    read = config("loss.cap=inf", "warm.steps=3", "sizes=[]", "actor.learning_rate=1e-7", r"name='\${x}: #'")
    assert read.name == "${x}: #"
    assert config(f"config={write(tmp_path, 'a.yaml', read.to_yaml())}") == read


def test_annotated_yaml_says_where_each_value_came_from(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "seed: 1\nloss:\n  type: narrow\n")
    loaded = load_config(Root, [f"config={file}", "sizes=[3]"])
    text = loaded.annotated_yaml()
    assert f"seed: 1  # from {file}:1\n" in text
    assert f"loss:\n  type: narrow  # from {file}:3\n  clip: 0.1  # from default\n" in text
    assert "sizes: [3]  # from command line\n" in text
    assert config(f"config={write(tmp_path, 'b.yaml', text)}") == loaded.config


# ---- help


def test_help_lists_keys_and_sections() -> None:
    text = help_text(Root)
    assert "  seed: int >= 0 (default 0)\n      Seed of the run.\n" in text
    assert "  loss: wide | narrow (default wide)\n      The loss.\n" in text
    assert "  warm (default null)\n      A warm start.\n" in text
    assert "width" not in text


def test_help_of_a_union_lists_its_variants() -> None:
    text = help_text(Root, "loss")
    wide, narrow = text.split("loss.type=narrow: A loss with a clip.")
    assert "loss.type=wide: A loss with a width." in wide
    assert "  loss.width: float > 0 and <= 1 (default 0.3)\n      Half width of the region.\n" in wide
    assert "  loss.penalty.kind: k1 | k3 (default k3)\n" in wide
    assert "  loss.clip: float > 0 (default 0.1)\n" in narrow


def test_help_of_a_section_shows_the_defaults_that_hold_there() -> None:
    assert "critic.learning_rate: float > 0 (default 1.0e-05)" in help_text(Root, "critic")
    assert "critic.learning_rate: float > 0 (default 1.0e-05)" in help_text(Root, "critic.learning_rate")
    assert "source.path: str (required)" in help_text(Root, "source")


def test_help_of_no_section() -> None:
    with pytest.raises(ConfigError, match=r"^--help los: there is no such section or key; did you mean loss\?$"):
        help_text(Root, "los")
