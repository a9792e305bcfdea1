"""The tables that a bench prints. Knows no measurement: it shows a report's fields."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .broker import Check, Report


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def checks_table(checks: "list[Check]") -> Table:
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


def show(report: "Report", console: Console | None = None) -> None:
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
