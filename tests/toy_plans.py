"""Hand-made plans: a transformer of two small blocks, decided in every way there is."""

from __future__ import annotations

from pq_compile.options import Options
from pq_compile.permutation import Permutation
from pq_compile.plan import Axis, Group, Groups, Linear, LinearPlan, Plan, Segment, Verdict
from pq_compile.reporting import Report, Section

HEADS, HEAD, WIDTH, MIDDLE = 4, 16, 64, 128
HOSTILE = "x.<script>alert('a&b')</script>"


def _axes(*names: str) -> tuple[Axis, ...]:
    return tuple(Axis(name[:-3], int(name[-2])) for name in names)


def groups() -> Groups:
    stream: list[Axis] = []
    rest: list[Group] = []
    segments: dict[Axis, tuple[Segment, ...]] = {}
    leaf = 2
    for b in range(2):
        p = f"blocks.{b}."
        stream += _axes(
            f"{p}attn.to_v.weight[1]", f"{p}attn.to_out.weight[0]", f"{p}norm.weight[0]"
        )
        stream += _axes(f"{p}ff.up.weight[1]", f"{p}ff.down.weight[0]")
        heads = _axes(f"{p}attn.to_v.weight[0]", f"{p}attn.to_out.weight[1]")
        middle = _axes(f"{p}ff.up.weight[0]", f"{p}ff.up.bias[0]", f"{p}ff.down.weight[1]")
        leaves = tuple(range(leaf, leaf + HEADS))
        rest.append(Group(str(heads[0]), leaves, HEAD, heads))
        rest.append(Group(str(middle[0]), (leaf + HEADS,), MIDDLE, middle))
        segments |= dict.fromkeys(heads, tuple(Segment(leaf, HEAD) for leaf in leaves))
        segments |= dict.fromkeys(middle, (Segment(leaf + HEADS, MIDDLE),))
        leaf += HEADS + 1
    embed = _axes("embed.weight[1]")
    segments |= dict.fromkeys(embed, (Segment(0, 16),))
    stream = [*_axes("embed.weight[0]"), *stream]
    segments |= dict.fromkeys(stream, (Segment(1, WIDTH),))
    order = sorted(segments, key=lambda axis: (axis.parameter != "embed.weight", axis))
    found = (
        Group("embed.weight[1]", (0,), 16, embed, ("graph input x",)),
        Group("embed.weight[0]", (1,), WIDTH, tuple(stream), ("add, which also reads y",)),
        *rest,
    )
    return Groups({axis: segments[axis] for axis in order}, found)


def _linear(name: str, size: tuple[int, int], route: str, why: str, **given: object) -> LinearPlan:
    linear = Linear(name, f"{name}.weight", None, *size, rows=32, per_sample=False)
    bits = None if route == "keep" else 4.5
    return LinearPlan(linear, route, why, bits_per_weight=bits, **given)  # type: ignore[arg-type]


def plan() -> Plan:
    linears = [
        _linear("embed", (16, WIDTH), "keep", "it reads the model's input", group="embed.weight[1]")
    ]
    verdicts = []
    for b in range(2):
        p, free = f"blocks.{b}.", dict[str, object](free=True, accepted=True)
        heads, middle = f"{p}attn.to_v.weight[0]", f"{p}ff.up.weight[0]"
        pinned = dict[str, object](group="embed.weight[0]", error_before=0.02, error_after=0.02)
        errors = dict[str, object](error_before=0.02, error_after=0.015 - 0.001 * b)
        linears += [
            _linear(f"{p}attn.to_v", (WIDTH, WIDTH), "w4a4", "it tiles", **pinned),
            _linear(
                f"{p}attn.to_out", (WIDTH, WIDTH), "w4a4", "it tiles", group=heads, **errors, **free
            ),
            _linear(f"{p}ff.up", (WIDTH, MIDDLE), "w4a4", "it tiles", **pinned),
            _linear(f"{p}ff.down", (MIDDLE, WIDTH), "w4a4", "it tiles", group=middle, free=True),
        ]
        verdicts += [
            Verdict(heads, True, 0.02, 0.015 - 0.001 * b, "gains on held-out rows", 0.25),
            Verdict(middle, False, 0.02, 0.0198, f"gain {1 + b}.0% is not above tau 2.0%", 0.5),
        ]
    head = Permutation(tuple((5 * i) % HEAD for i in range(HEAD)))
    orders = {leaf: head for b in range(2) for leaf in range(2 + 5 * b, 6 + 5 * b)}
    return Plan("best", "nvfp4", tuple(linears), orders, tuple(verdicts))


def report(seconds: float = 1.5) -> Report:
    section = Section(
        plan=plan(),
        groups=groups(),
        phase="serving",
        scheme="w4a4",
        calibration_calls=64,
        weight_bytes_before=90_000,
        weight_bytes_after=25_000,
        seconds={"plan": seconds},
        memory={"peak while calibrating": 3 << 30},
        warnings=("The observed timesteps span 0.4 to 1.0 of the schedule.",),
    )
    return Report((section,), Options())


def hostile_report() -> Report:
    """Every string of the report is markup, and every name too."""
    axis = Axis(f"{HOSTILE}.weight", 1)
    group = Group(str(axis), (0,), 16, (axis,), (HOSTILE,))
    linear = _linear(HOSTILE, (16, 16), "keep", HOSTILE, group=str(axis))
    section = Section(
        plan=Plan("best", "nvfp4", (linear,)),
        groups=Groups({axis: (Segment(0, 16),)}, (group,)),
        phase=HOSTILE,
        scheme=HOSTILE,
        calibration_calls=0,
        weight_bytes_before=0,
        weight_bytes_after=0,
        seconds={HOSTILE: 1.0},
        memory={HOSTILE: 1},
        kernels={HOSTILE: HOSTILE},
        warnings=(HOSTILE,),
    )
    return Report((section,), Options())
