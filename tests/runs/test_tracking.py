"""What TensorBoard shows of a run, read back through TensorBoard's own code."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.hparams import backend_context
from tensorboard.plugins.hparams.api_pb2 import ListSessionGroupsRequest, Status
from tensorboard.plugins.hparams.list_session_groups import Handler
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mamba.errors import ConfigError
from mamba.runs.folder import create_run, exclusive
from mamba.runs.hparams import EVERY_RUN_HAS, FIRST_HPARAMS, HPARAM_METRICS, HPARAMS_FILE, write_hparams


def test_scalars_images_and_config(small_fit, tmp_path):
    small_fit()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = events.Tags()
    wanted = {"train/loss", "train/lr", "train/images_per_s", "val/loss", "val/accuracy", "val/ema_accuracy"}
    wanted |= {"test/accuracy", "model/params", "model/macs", "step/loss"}
    assert wanted <= set(tags["scalars"])
    assert not [tag for tag in tags["scalars"] if tag.startswith("lr/")], "twenty cards before val/accuracy"
    assert [e.step for e in events.Scalars("train/loss")] == [4, 8, 12]
    assert tags["images"] == ["train/augmented", "test/confusion", "test/classes"]
    text = next(t for t in tags["tensors"] if t.startswith("config"))
    assert b"batch_size: 16" in events.Tensors(text)[0].tensor_proto.string_val[0]


def shown_status(run):
    """What the HPARAMS tab says of one run."""
    events = EventAccumulator(str(run))
    events.Reload()
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    return HParamsPluginData.FromString(content).session_start_info.hparams["status"].string_value


def hparams_table(logdir):
    """TensorBoard's HPARAMS tab for a folder: the columns, and every trial's values and metrics."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(logdir))
    ctx = RequestContext()
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider, logdir=str(logdir)))
    metadata = context.hparams_metadata(ctx, "")
    experiment = context.experiment_from_metadata(ctx, "", True, metadata, [])
    request = ListSessionGroupsRequest(start_index=0, slice_size=100, allowed_statuses=list(Status.values()))
    groups = Handler(ctx, context, "", request).run().session_groups
    return experiment, groups


def test_hparams_tab_lists_every_run_with_its_final_metrics(small_fit, tmp_path):
    results = {}
    for name, values in (("a", {"optim__lr": 1e-3}), ("b", {"optim__grad_clip": None, "data__mixup": 0.5})):
        (tmp_path / "runs" / name).mkdir(parents=True)
        results[f"runs/{name}"] = small_fit(f"runs/{name}", **values)
    experiment, groups = hparams_table(tmp_path / "runs")
    assert {m.name.tag for m in experiment.metric_infos} == set(HPARAM_METRICS)
    shown_first = [m.name.tag for m in experiment.metric_infos[:5]]
    assert shown_first == list(EVERY_RUN_HAS), "the metric that counts, and only what trainings and cuts both have"
    columns = {h.name for h in experiment.hparam_infos}
    assert {"optim.lr", "optim.grad_clip", "data.mixup", "ema.decay", "seed"} <= columns and "out" not in columns
    assert {h.name for h in experiment.hparam_infos[:5]} == {"status", *FIRST_HPARAMS}
    assert len(groups) == 2
    by_lr = {round(g.hparams["optim.lr"].number_value, 6): g for g in groups}
    assert by_lr[0.001].hparams["optim.grad_clip"].string_value == "1.0"
    assert by_lr[0.005].hparams["optim.grad_clip"].string_value == "None"
    for lr, name in ((0.001, "runs/a"), (0.005, "runs/b")):
        shown = {m.name.tag: m.value for m in by_lr[lr].metric_values}
        for metric in HPARAM_METRICS:
            assert shown[metric] == pytest.approx(results[name]["metrics"][metric], rel=1e-5), metric
        assert by_lr[lr].sessions[0].status == Status.STATUS_SUCCESS
        assert by_lr[lr].hparams["status"].string_value == "finished"


def test_hparams_tab_lists_what_did_not_finish_with_a_status_to_filter_by(small_fit, small_config, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    write_hparams(tmp_path / "runs" / "a", small_config(optim__epochs=1), "interrupted")
    small_fit("runs/a", optim__epochs=1)
    for status in ("failed", "stopped early", "interrupted"):
        (tmp_path / "runs" / status).mkdir()
        write_hparams(tmp_path / "runs" / status, small_config(), status)
    experiment, groups = hparams_table(tmp_path / "runs")
    assert {g.hparams["status"].string_value: g.sessions[0].status for g in groups} == {
        "finished": Status.STATUS_SUCCESS,
        "stopped early": Status.STATUS_SUCCESS,
        "failed": Status.STATUS_FAILURE,
        "interrupted": Status.STATUS_UNKNOWN,
    }
    column = next(h for h in experiment.hparam_infos if h.name == "status")
    assert set(column.domain_discrete) == {"finished", "failed", "stopped early", "interrupted"}


def test_the_first_columns_are_the_keys_that_differ(small_config, tmp_path):
    """They were four constants, whatever was compared."""
    for i in range(6):
        config = small_config(
            name="x", trial=f"t{i}", optim__lr=1e-3 * (i + 1), seed=i % 2, model__d_state=8 * (i == 5) or 4
        )
        folder = create_run(config)
        write_hparams(folder, config, "finished")
    last = tmp_path / "last"
    last.mkdir()
    (folder / HPARAMS_FILE).rename(last / HPARAMS_FILE)
    (tmp_path / "runs" / "x" / "t0" / "config.yaml").write_text("data: [")  # somebody else's damage is not ours
    experiment, groups = hparams_table(last)
    differ = {h.name for h in experiment.hparam_infos if h.differs}
    assert {"status", "optim.lr", "seed", "model.d_state"} <= differ and len(differ) == 5
    experiment, groups = hparams_table(tmp_path / "runs")
    assert {g.name[:4] for g in groups} == {f"t{i} x" for i in range(5)}, "the trial first: the table cuts names"


def test_the_keys_of_a_sweep_are_followed_by_others_that_say_something(small_config, tmp_path):
    """They were followed by the first of the alphabet, `cut.block` and `cut.conv1d`, 0 in every row."""
    config = small_config(name="x", trial="t")
    write_hparams(create_run(config), config, "finished", first=["optim.weight_decay", "model.drop_path"])
    experiment, _ = hparams_table(tmp_path)
    differ = {h.name for h in experiment.hparam_infos if h.differs}
    assert differ == {"status", "optim.weight_decay", "model.drop_path", "optim.lr", "model.name"}


def test_two_runs_of_one_name_are_not_averaged(small_config, tmp_path):
    for out in ("a", "b"):
        config = small_config(name="x", trial="t").with_values({"out": tmp_path / out})
        write_hparams(create_run(config), config, "finished")
    _, groups = hparams_table(tmp_path)
    assert len(groups) == 2


def test_the_layout_puts_accuracy_first_and_all_rates_on_one_card(small_fit, tmp_path):
    small_fit(optim__layer_decay=0.5)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    rates = {tag: [e.value for e in events.Scalars(tag)] for tag in ("train/lr", "train/lr_lowest")}
    assert all(0 < low < high for high, low in zip(*rates.values(), strict=True))
    text = events.Tensors(CONFIG_SUMMARY_TAG)[0].tensor_proto.string_val[0]
    layout = Layout.FromString(text)
    assert [category.title for category in layout.category] == ["accuracy", "loss", "training"]
    tags = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    known = events.Tags()["scalars"]
    assert all(any(re.match(tag, name) for name in known) for tag in tags), "no card stays empty"
    band = layout.category[-1].chart[-1].margin.series[0]
    assert {band.value, band.lower, band.upper} <= set(known)


def test_what_is_no_tensorboard_run_has_no_events(small_fit, small_config, tmp_path):
    small_fit(tracking__backends="none", optim__epochs=1)
    write_hparams(tmp_path / "run", small_config(tracking__backends=()), "failed")
    assert not list((tmp_path / "run").glob("events*")) and (tmp_path / "run" / "result.json").exists()


def test_a_resumed_run_drops_what_it_repeats(small_fit, tmp_path):
    small_fit(optim__epochs=2)
    run = tmp_path / "run"
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 3, "train/loss": 9.0}) + "\n" + '{"epoch": 4, "trai')
    (run / "result.json").unlink()
    small_fit(optim__epochs=3)
    epochs = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3]


def test_tensorboard_drops_what_a_resumed_run_repeats(small_fit, tmp_path):
    small_fit(checkpoint__keep=3)
    run = tmp_path / "run"
    for folder in sorted((run / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    small_fit()
    events = EventAccumulator(str(run))
    events.Reload()
    assert [e.step for e in events.Scalars("val/loss")] == [4, 8, 12]


def test_a_folder_that_holds_a_run_is_not_overwritten(small_config, tmp_path):
    folder = create_run(small_config(trial="one"))
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="holds a run already; choose another --trial or --name, or .* --resume"):
        create_run(small_config(trial="one", seed=5))
    assert (folder / "config.yaml").read_text() == before


def test_an_unwritable_folder_is_refused(small_config, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match="out: .* could not be written"):
        create_run(small_config())


def test_one_trainer_at_a_time_in_a_folder(tmp_path):
    busy = pytest.raises(ConfigError, match="is being trained in by another process")
    with exclusive(tmp_path), busy, exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass
