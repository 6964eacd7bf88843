"""Time the scan's backends side by side, on any device.

    python benchmarks/scan.py                                   # the shapes of the design, every backend of the device
    python benchmarks/scan.py --shapes 8x384x196x16 --backends two_phase reference --threads 2 --dtype float32
    python benchmarks/scan.py --graph --json scan.json          # CUDA graph replays: without launch overhead

Shapes are batch x d_inner x length x d_state. D, z, delta_bias and softplus are on; A, D and delta_bias are float32,
the rest is `--dtype`, as under autocast; sequences are (batch, length, channel) tensors transposed, as in the model.
Each number is the median of `--repeats` timed calls after a warm-up, with the 10th and 90th percentile. Backends take
turns within a shape, so that drift hits all of them; on a CPU a turn is a call that is not timed and one that is,
because the first one pays for what the backend before it left: cold caches, memory given back to the system. `speedup`
is the ratio of medians to `reference`, when it is among them. The modes called two_way scan both directions at once
(`bidirectional_scan`, z shared; `reference` scans twice, with flips); `ratio` is their time over one direction's.
On a CPU a last table sets the speedups beside those that the research notes behind this code claim; one of the levels
is `one_channel` (one_channel_scan.cpp), which has no gradients and is timed in inference. `mamba_ssm` joins when it is
importable, `reference_compiled` (torch.compile of the reference; slow to compile) when it is asked for by name.
`--clock cpu` counts processor time instead: with `--threads 1`, for a machine that others use too.

A CUDA time comes from events around one call. The default shapes are larger than any L2 cache; small ones are not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project, wherever this is run from

from benchmarks.one_channel_scan import one_channel_scan
from mamba.ops.scan import BACKENDS, bidirectional_scan, cpu, selective_scan
from mamba.ops.scan.reference import selective_scan_reference
from mamba.runs.environment import environment

DEFAULT_SHAPES = {
    "cuda": ["1024x384x64x16", "256x384x196x16", "64x384x1024x16"],
    "cpu": ["1x384x196x16", "8x384x196x16", "32x384x64x16"],
}
ONE_WAY = {"two_way": "forward", "two_way_backward": "forward_backward"}  # the modes that they are compared with
LEVELS = [  # of the research notes: what, speedup over the plain loop, and which mode and backend are ours
    ("two phases", 2.2, "forward", "two_phase"),
    ("C++, one channel at a time", 2.8, "inference", "one_channel"),  # it has no gradients
    ("C++, both directions in parallel", 3.5, "two_way", "cpu"),
    ("C++, vectorised", 4.0, "forward", "cpu"),
]
MODES = ["inference", "forward", "forward_backward", *ONE_WAY]
REFERENCE_LIMIT = 2**24  # largest batch x d_inner x length x d_state that `reference` is timed on unasked


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    batch, d_inner, length, d_state = shape
    g = torch.Generator(device).manual_seed(0)

    def sequence(channels: int) -> Tensor:
        x = torch.randn(batch, length, channels, generator=g, device=device)
        return x.to(dtype).transpose(1, 2)

    return {
        "u": sequence(d_inner),
        "delta": sequence(d_inner) * 0.5,
        "A": -torch.arange(1.0, d_state + 1, device=device).expand(d_inner, -1).contiguous(),
        "B": sequence(d_state),
        "C": sequence(d_state),
        "D": torch.ones(d_inner, device=device),
        "z": sequence(d_inner),
        "delta_bias": torch.rand(d_inner, generator=g, device=device) * 4.6 - 6.9,  # steps of 0.001 to 0.1
    }


def backends(
    names: list[str] | None, shape: tuple[int, ...], device: str, dtype: torch.dtype
) -> dict[str, Callable[..., Tensor]]:
    """The functions to time; unasked: what the device can run in reasonable time."""
    table: dict[str, Callable[..., Tensor]] = {
        name: lambda *a, _name=name: selective_scan(*a, delta_softplus=True, backend=_name) for name in BACKENDS
    }
    if device == "cpu":
        table.pop("triton", None)
        if cpu.available() and dtype == torch.float32:
            table["one_channel"] = one_channel_scan
    if importlib.util.find_spec("mamba_ssm") and device == "cuda":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        table["mamba_ssm"] = lambda *a: selective_scan_fn(*a, delta_softplus=True)
    if names is None:
        size = shape[0] * shape[1] * shape[2] * shape[3]
        return {k: f for k, f in table.items() if device == "cpu" or k != "reference" or size <= REFERENCE_LIMIT}
    if "reference_compiled" in names:
        compiled = torch.compile(selective_scan_reference)
        table["reference_compiled"] = lambda *a: compiled(*a, delta_softplus=True)
    unknown = set(names) - set(table)
    if unknown:
        raise SystemExit(f"unknown or missing here: {', '.join(sorted(unknown))}; valid: {', '.join(table)}")
    return {name: table[name] for name in names}


def calls(name: str, scan: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """What is timed: inference, the forward of training, forward and backward, and these two for both directions."""
    plain = list(tensors.values())
    leaves = [t.detach().requires_grad_() for t in plain]
    grad = torch.randn_like(tensors["u"])

    def inference() -> Tensor:
        with torch.no_grad():
            return scan(*plain)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(scan(*leaves), leaves, grad)

    second = {k: t.detach().clone().requires_grad_() for k, t in tensors.items() if k != "z"}
    first = dict(zip(tensors, leaves, strict=True))
    pairs = {k: (t, second[k]) if k in second else t for k, t in first.items()}

    def two_way() -> tuple[Tensor, Tensor]:
        return bidirectional_scan(**pairs, delta_softplus=True, backend=name)

    def two_way_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(two_way(), [*leaves, *second.values()], (grad, grad))

    if name == "one_channel":
        return {"inference": inference}
    found = {"inference": inference, "forward": lambda: scan(*leaves), "forward_backward": both}
    return found | ({"two_way": two_way, "two_way_backward": two_way_backward} if name in BACKENDS else {})


def captured(call: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def once(call: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    """Milliseconds of one call; `clock` is for a CPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = clock()
    call()
    return (clock() - begin) * 1e3


def measure(
    table: dict[str, Callable[[], object]], device: str, repeats: int, seconds: float, clock: Callable[[], float]
) -> dict[str, dict[str, float | int]]:
    """Take turns until each has `repeats` timings or its share of `seconds` is used (at least three)."""
    for call in table.values():
        for _ in range(3 if device == "cuda" else 1):
            once(call, device, clock)
    times: dict[str, list[float]] = {name: [] for name in table}
    for i in range(repeats):
        for name, call in table.items():
            if i < 3 or sum(times[name]) < seconds * 1e3:
                if device == "cpu":
                    call()
                times[name].append(once(call, device, clock))
    result: dict[str, dict[str, float | int]] = {}
    for name, values in times.items():
        p10, median, p90 = torch.tensor(values).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        result[name] = {"median_ms": median, "median_ms_low": p10, "median_ms_high": p90, "repeats": len(values)}
    return result


def print_levels(rows: list[dict]) -> None:
    """The research notes' claims beside the measured speedups over `reference`."""
    found = {(r["shape"], r["mode"], r["backend"]): r.get("speedup") for r in rows}
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    print(f"\n{'speedup over the plain loop':>34} {'claimed':>8} " + " ".join(f"{shape:>14}" for shape in shapes))
    for what, claimed, mode, backend in LEVELS:
        ours = (found.get((shape, mode, backend)) for shape in shapes)
        print(f"{what:>34} {claimed:8.1f} " + " ".join(f"{'-' if x is None else f'{x:.1f}':>14}" for x in ours))


def rows(
    shapes: Sequence[str] | None = None,
    backends_: Sequence[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    modes: Sequence[str] = MODES,
    repeats: int = 50,
    seconds: float = 5.0,
    graph: bool = False,
    threads: int | None = None,
    clock: str = "wall",
) -> Iterator[dict[str, Any]]:
    """A row a shape, mode and backend: see this file's head."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    if threads:
        torch.set_num_threads(threads)
    ticks = time.process_time if clock == "cpu" else time.perf_counter
    medians: dict[tuple[str, str | None, str], float] = {}
    for text in shapes or DEFAULT_SHAPES[device]:
        shape = tuple(int(n) for n in text.split("x"))
        tensors = make_inputs(shape, kind, device)
        wanted = None if backends_ is None else list(backends_)
        ways = {name: calls(name, scan, tensors) for name, scan in backends(wanted, shape, device, kind).items()}
        for mode in modes:
            table = {name: way[mode] for name, way in ways.items() if mode in way}
            if graph and device == "cuda":
                table = {name: captured(call) for name, call in table.items()}
            found = measure(table, device, repeats, seconds, ticks)
            for name, row in found.items():
                one_way = medians.get((text, ONE_WAY.get(mode), name))
                medians[text, mode, name] = row["median_ms"]
                more = {}
                if "reference" in found:
                    more["speedup"] = found["reference"]["median_ms"] / row["median_ms"]
                if one_way is not None:
                    more["ratio"] = row["median_ms"] / one_way
                yield {"shape": text, "mode": mode, "backend": name, **row, **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="batch x d_inner x length x d_state, as 1024x384x64x16")
    parser.add_argument("--backends", nargs="+")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=5.0, help="at most this long for one number")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="on a CPU: elapsed or processor time")
    parser.add_argument("--graph", action="store_true", help="replay a CUDA graph of the call")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    about = environment(torch.device(args.device))
    report = {**about, "dtype": args.dtype, "graph": args.graph, "clock": args.clock, "rows": []}
    print(json.dumps(about["hardware"]), json.dumps(about["versions"]), "graph" if args.graph else "eager")
    header = f"{'shape':>16} {'mode':>17} {'backend':>19} {'median ms':>10} {'p10':>9} {'p90':>9}"
    print(f"{header} {'speedup':>8} {'ratio':>6}")
    for row in rows(args.shapes, args.backends, args.device, args.dtype, args.modes, args.repeats, args.seconds,
                    args.graph, args.threads, args.clock):  # fmt: skip
        report["rows"].append(row)
        numbers = f"{row['median_ms']:10.3f} {row['median_ms_low']:9.3f} {row['median_ms_high']:9.3f}"
        for key, width in (("speedup", "8.1f"), ("ratio", "6.2f")):
            numbers += f" {row[key]:{width}}" if key in row else ""
        print(f"{row['shape']:>16} {row['mode']:>17} {row['backend']:>19} {numbers}", flush=True)
    if args.device == "cpu" and any("speedup" in row for row in report["rows"]):
        print_levels(report["rows"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
