"""The command line: every value can be said, files lie under it, its help is short and quick."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mamba.config import help as pages
from mamba.config.choices import words_of
from mamba.config.cli import ABLATE, PRUNE, TRAIN, TUNE, parse, parse_prune_args, parse_train_args
from mamba.config.keys import choices, dotted_keys, may_be_none
from mamba.config.presets import get_preset
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError

ROOT = Path(__file__).parents[2]
COMMANDS = [TRAIN, PRUNE, TUNE, ABLATE]


def test_every_choice_of_every_key_can_be_typed():
    seen = 0
    for key in dotted_keys():
        for word in choices(key):
            assert parse_train_args([f"--{key}", word]).config.flat()[key] == word, key
            seen += 1
    optional = [k for k in dotted_keys() if may_be_none(k) and choices(k)]
    assert seen > 60 and {"model.class_token", "model.mixer"} <= set(optional)
    assert parse_train_args(["--model.class-token", "none"]).config.model.class_token == "none"


def test_every_optional_key_can_be_none():
    for key in filter(may_be_none, dotted_keys()):
        assert parse_train_args([f"--{key}", "None"]).config.flat()[key] is None


def test_words_of_a_union():
    annotation = RunConfig.model_fields["data"].annotation.model_fields["device"].annotation
    assert words_of(annotation | None) == ("auto", "cpu", "gpu") and words_of(int | None) == ()


def test_a_file_lies_over_the_preset_and_under_the_words(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 0.1, epochs: 7}\ndata.batch_size: 32\nmodel: {class_token: none}\nseed: 5\n")
    args = parse_train_args(["--config", str(file), "--optim.lr", "0.2"])
    wanted = {"optim.lr": 0.2, "optim.epochs": 7, "data.batch_size": 32, "model.class_token": "none", "seed": 5}
    assert args.config == get_preset("quickstart").with_values(wanted) and args.file == file
    args = parse_train_args(["--preset", "v1", "--config", str(file)])
    assert args.config == get_preset("v1").with_values({**wanted, "optim.lr": 0.1})


def test_a_runs_own_config_starts_a_run_beside_it(tmp_path):
    own = get_preset("v2").with_values({"name": "v2", "trial": "first", "seed": 3}).resolve()
    folder = tmp_path / "v2" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(own.to_yaml())
    for given in (folder, folder / "config.yaml"):
        assert parse_train_args(["--config", str(given)]).config == own.model_copy(update={"trial": None})
    (tmp_path / "other.yaml").write_text(own.to_yaml())
    assert parse_train_args(["--config", str(tmp_path / "other.yaml")]).config == own


def test_a_file_names_the_checkpoint_whose_recipe_is_taken(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {checkpoint: runs/a}\noptim: {lr: 0.1}\n")
    seen = []
    args = parse_prune_args(["--config", str(file)], recipe_of=lambda path: seen.append(path) or get_preset("v1"))
    assert seen == [Path("runs/a")] and args.config.data.augment == "randaugment" and args.config.optim.lr == 0.1
    with pytest.raises(ConfigError, match="leave out --model.mixer"):
        parse_prune_args(["--config", str(file), "--model.mixer", "forward"], recipe_of=lambda _: get_preset("v1"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1\n- 2\n", "mine.yaml does not hold a run config"),
        ("optim: {lr: 0.1, lr: 0.2}", "mine.yaml cannot be read as a config: line 1: lr is given twice"),
        ("seed: 1\nseed: 2", "line 2: seed is given twice"),
        ("optim.lr: 1\noptim: {lr: 2}", "optim.lr is given twice"),
        ("optim: [1]", "mine.yaml: optim holds .1.; valid: keys of optim"),
        ("optim: {lrr: 1}", "unknown key 'optim.lrr'.*did you mean optim.lr.$"),
        ("optim: {lr: .nan}", "optim.lr: should be a finite number"),
        ("seed: -1", "seed: should be greater than or equal to 0, got -1"),
        ("a: &a [1, 2]\nb: *a", r"line 2: aliases \(\*a\) are not read"),
        ("optim: {<<: {lr: 1}}", "merge keys"),
        ("a: [" * 5000, "nested too deeply"),
        ("x: " + "y" * 300_000, "larger than 256 KiB"),
        ('out: "a\\0b"', "out 'a.x00b': no path holds a null character"),
        ("optim: {lr: 0.1", "cannot be read as a config: while parsing"),
        ("optim: !!python/object:os.system {}", "cannot be read as a config"),
        ("optim: {lr: " + "z" * 1000 + "}", "^.{0,200}$"),
        ("\n".join(f"key{i}: 1" for i in range(1000)), "^.{0,300}$"),
        ("1: 2", "does not hold a run config"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as caught:
        parse_train_args(["--config", str(file)]).config.resolve()
    assert "\n" not in str(caught.value) and time.perf_counter() - began < 5


def test_a_billion_laughs_end_at_once(tmp_path):
    lines = ["a0: &a0 [lol, lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="aliases") as caught:
        parse_train_args(["--resume", str(tmp_path)])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"", b"null", b"\x00", b"{", b"seed: " + b"9" * 5000])
def test_a_damaged_config_of_a_run_is_one_sentence(tmp_path, data):
    (tmp_path / "config.yaml").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        parse_train_args(["--resume", str(tmp_path)])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 3}', '{"config": {"seed": NaN}}', "[" * 100_000, "null"])
def test_a_damaged_experiment_is_one_sentence(tmp_path, text):
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_train_args(["--resume", str(tmp_path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--name " + "a" * 300, "name: string should have at most 100 characters, got 'a{20,40}.*'$"),
        ("--trial ../../up", "trial: should be of letters, digits, '.', '_' and '-', the first"),
        ("--trial ..", "trial: should be of letters"),
        ("--name a/b", "name: should be of letters"),
        ("--seed -1", "seed: should be greater than or equal to 0"),
        ("--model.depth 10000000", "model.depth: should be less than or equal to 1000, got '10000000'"),
        ("--model.d-model 1000000000", "model.d_model: should be less than or equal to 65536"),
        ("--model.d-model 65536 --model.depth 1000", r"make about 6e\+13 weights; at most 1e\+11"),
        ("--data.img-size 4000000", "data.img_size: should be less than or equal to 4096"),
        ("--out ~nobody-of-that-name/runs", "out ~nobody-of-that-name/runs: there is no such home folder"),
        ("--lr 0.1", "unknown key 'lr'.*did you mean optim.lr.$"),
        ("--optim.epoch 3", "did you mean optim.epochs.$"),
        ("--" + "x" * 3000 + " 1", "^unknown key 'x{80}'; valid"),
        ("x" * 3000, "^unexpected word 'x{80}'; options"),
        ("--completion nosh", "--completion nosh: there is none for it; valid: bash"),
        ("--config nowhere.yaml", "^--config nowhere.yaml: there is no such file$"),
        ("--config tests", "^tests cannot be read as a config: Is a directory$"),
    ],
)
def test_refused_in_one_sentence_at_once(words, message):
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as caught:
        parse_train_args(words.split()).config.resolve()
    assert "\n" not in str(caught.value) and time.perf_counter() - began < 2


def test_every_whole_number_is_bounded():
    for key, group in dotted_keys().items():
        field = group.model_fields[key.rpartition(".")[2]]
        if field.annotation in (int, int | None):
            with pytest.raises(ConfigError, match=key):
                RunConfig().with_values({key: 10**10})
            with pytest.raises(ConfigError, match=key):
                RunConfig().with_values({key: -1})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.prog)
def test_help_shows_the_first_keys_and_help_all_the_rest(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lengths = []
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            parse(command, [word], "What it does.", lambda _: RunConfig())
        assert end.value.code == 0
        text = capsys.readouterr().out
        shown = {key for key in dotted_keys() if f"--{key.replace('_', '-')} " in text}
        first = {key for keys in command.first.values() for key in keys}
        assert len(first) == 10 and shown == (first if word == "--help" else set(dotted_keys()))
        assert "--completion bash" in text.splitlines()[-1] and "What it does." in text
        lengths.append(len(text.splitlines()))
    assert lengths[0] < 75 < 300 < lengths[1]


def test_help_shows_the_values_that_would_count(capsys):
    with pytest.raises(SystemExit):
        parse_train_args(["--preset", "v2", "--optim.epochs", "77", "--help"])
    text = capsys.readouterr().out
    assert "(default: 77)" in text and "cifar10)" in text


def test_help_ends_quietly_where_its_reader_does():
    for words in ("--help-all", "--completion bash"):
        command = f"{sys.executable} ray_jobs/train.py {words} | head -n 1"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        assert not done.stderr and len(done.stdout.splitlines()) == 1, words


@pytest.mark.parametrize("shell", pages.SHELLS)
def test_completion_knows_keys_and_choices(shell, capsys):
    with pytest.raises(SystemExit) as end:
        parse_train_args(["--completion", shell])
    text = capsys.readouterr().out
    assert end.value.code in (0, None) and "mamba-train" in text
    assert "model.class-token" in text and "bidirectional_shared" in text


@pytest.mark.parametrize("script", ["train", "prune", "tune", "ablate", "compare"])
def test_help_imports_neither_torch_nor_ray(script):
    code = (
        "import sys, importlib\n"
        f"main = importlib.import_module('ray_jobs.{script}').main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'ray', 'optuna', 'numpy', 'matplotlib', 'rich', 'pandas'} & set(sys.modules)\n"
        "sys.exit(', '.join(slow) if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_pipe_that_holds_is_left_alone(capsys):
    with pages.quiet_pipe():
        print("text")
    assert capsys.readouterr().out == "text\n"


def test_yaml_of_a_config_can_be_read_again():
    values = RunConfig().flat()
    assert yaml.safe_load(io.StringIO(RunConfig().to_yaml()))["seed"] == values["seed"]
