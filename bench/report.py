"""What `ralmq bench broker` found, and the tables that show it. Knows no measurement."""

from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """One payload size: medians over the rounds, by system.

    Attributes:
        rate: round trips a second.
        ratio: rate of ralmq divided by that of the other.
        main_cpu_us, other_cpu_us: CPU time of the broker a round trip, of its main thread and of its I/O thread.
    """

    size: int
    label: str
    window: int
    rate: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    main_cpu_us: dict[str, float] = field(default_factory=dict)
    other_cpu_us: dict[str, float] = field(default_factory=dict)


@dataclass
class Check:
    """A bound; `required` is False for a target that is only printed beside what was measured."""

    name: str
    bound: str
    measured: float
    ok: bool
    required: bool = True


@dataclass
class Report:
    """What `ralmq bench broker` found; `ok` is False where a required bound is missed.

    Attributes:
        cores_in_use: how many cores were at work while nothing was measured: above some tenths, the figures are rough.
    """

    load: str
    load_note: str
    cores: int
    rounds: int
    seconds: float
    rows: list[Row]
    idle_cpu_percent: dict[str, float]
    cores_in_use: float
    faults: dict[str, int]
    notes: list[str]
    checks: list[Check]
    bench: str = "broker"

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks if check.required)

    def document(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return asdict(self) | {"ok": self.ok}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def checks_table(checks: list[Check]) -> Table:
    """Bound, measured, ok; a target that does not decide has its mark in brackets."""
    table = Table(title="bounds", title_justify="left")
    table.add_column("what")
    for heading in ("bound", "measured", "ok"):
        table.add_column(heading, justify="right")
    for check in checks:
        mark = "[green]yes[/]" if check.ok else "[red]no[/]"
        bound = check.bound if check.required else f"({check.bound})"
        table.add_row(check.name, bound, _number(check.measured), mark)
    return table


def show(report: Report, console: Console | None = None) -> None:
    """Prints rates, ratios, CPU time a round trip, and the bounds."""
    console = console or Console()
    table = Table(title="request and reply, 4 clients and 4 workers, tcp", title_justify="left")
    table.add_column("payload")
    table.add_column("broker")
    for heading in ("round trips/s", "ralmq / this", "main CPU us", "I/O CPU us"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        for name, rate in row.rate.items():
            ratio = f"{row.ratio[name]:.2f}" if name in row.ratio else ""
            cpu, others = row.main_cpu_us[name], row.other_cpu_us[name]
            table.add_row(row.label, name, _number(rate), ratio, f"{cpu:.1f}", f"{others:.1f}")
        table.add_section()
    console.print(table)
    console.print(checks_table(report.checks))
    idle = ", ".join(f"{name} {percent:.1f} %" for name, percent in report.idle_cpu_percent.items())
    console.print(f"Idle CPU: {idle}. Medians of {report.rounds} rounds of {report.seconds} s on {report.cores} cores.")
    if report.cores_in_use > 0.3:
        console.print(
            f"[yellow]Other work kept {report.cores_in_use:.1f} cores busy meanwhile: the figures are rough.[/]"
        )
    if report.load != "c":
        console.print(f"[yellow]The load came from Python ({report.load_note}), which limits all brokers.[/]")
    if len(report.rows[0].rate) == 1:
        console.print("[yellow]No ratios: the baselines are in tests/baselines of a source checkout.[/]")
    for note in report.notes:
        console.print(f"[red]{note}[/]")
