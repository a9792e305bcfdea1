"""The tables that commands print. Knows the fields of a status and of hits; asks nobody."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..schema.keys import Entry

SHOWN: Final = 240  # characters of a passage
WINDOW: Final = 16  # tokens behind a neighbour that an index gives, where its document has so many
CUT: Final = 250  # bytes; of longer parts of a passage an index cuts the rest off
_FIRST_WORD: Final = re.compile(r"\A\S*\s+")
_LAST_WORD: Final = re.compile(r"\s+\S*\Z")


def processes(pids: Mapping[str, int], url: str, status: Mapping[str, Any]) -> Table:
    """What came up: a row for each process of a cluster."""
    workers = {worker["pid"]: worker for worker in status["workers"]}
    table = _table("cluster", "process", "serves", "layers", "pid")
    for name, pid in pids.items():
        worker = workers.get(pid, {})
        table.add_row(name, url if name == "broker" else _services(worker), _layers(worker), str(pid))
    return table


def status_tables(status: Mapping[str, Any]) -> list[Table]:
    """Workers, services and pipelines, those that there are."""
    workers = _table("workers", "name", "serves", "layers", "state", "in flight", "pid")
    for worker in sorted(status["workers"], key=lambda worker: str(worker["name"])):
        load = f"{worker['in_flight']} / {worker['capacity']}"
        row = (worker["name"], _services(worker), _layers(worker), worker["state"], load, str(worker["pid"]))
        workers.add_row(*map(escape, row))
    services = _table("services", "name", "workers", "queued", "finished")
    for name, service in status["services"].items():
        services.add_row(escape(name), *(str(service[key]) for key in ("workers", "queued", "finished")))
    pipelines = _table("pipelines", "model", "formed", "stages", "bubble")
    for line in status["pipelines"]:
        stages = ", ".join(line["stages"]) or f"missing layers: {line['missing']}"
        bubbles = ", ".join("-" if share is None else f"{share:.0%}" for share in line.get("bubble", ()))
        pipelines.add_row(escape(line["model"]), "yes" if line["formed"] else "no", escape(stages), bubbles)
    return [table for table in (workers, services, pipelines) if table.row_count or table is workers]


def keys_table(entries: Sequence["Entry"]) -> Table:
    """Who is let in, and who no more."""
    table = _table("keys", "name", "role", "may offer", "state", "public key")
    for entry in entries:
        offers = ", ".join(entry.offers) if entry.role == "worker" else ""
        row = (entry.name, entry.role, offers, "revoked" if entry.revoked else "let in", entry.public)
        table.add_row(*map(escape, row))
    return table


def hits_table(found: Sequence[Sequence[Mapping[str, Any]]], ids: Any, distances: Any, metric: str) -> Table:
    """A row for each neighbour, the nearest first; the query's number where there are several.

    Args:
        metric: of the index: distances of "l2" are small where it is near; others are scores, which are large there.
    """
    several = len(ids) > 1
    value = "distance" if metric == "l2" else "score"
    table = _table("neighbours", *(("query",) if several else ()), "id", value, "document", "text")
    for query, payloads in enumerate(found):
        number = (str(query),) if several else ()
        if several and (ids[query] < 0).all():
            table.add_row(*number, "", "", "", "nothing found")
        for payload, identity, distance in zip(payloads, ids[query], distances[query], strict=False):
            if identity < 0:
                continue
            document = str(payload.get("document", ""))
            table.add_row(
                *number, str(identity), f"{distance:.4g}", escape(document), escape(_shortened(_passage(payload)))
            )
        table.add_section()
    return table


def _passage(payload: Mapping[str, Any]) -> str:
    """The text of a payload, without the parts of words where it was cut out of its document."""
    if "context" not in payload and "continuation" not in payload:
        return str(payload.get("text") or _fields(payload))
    context, text = (str(payload.get(name, "")) for name in ("context", "continuation"))
    shown = whole = context + text
    if payload.get("start") or len(context.encode()) > CUT:
        shown = _FIRST_WORD.sub("… ", shown)
    if len(payload.get("tokens", ())) - payload.get("split", 0) >= WINDOW or len(text.encode()) > CUT:
        shown = _LAST_WORD.sub(" …", shown)
    return shown if shown.strip("… ") else whole


def _shortened(text: str) -> str:
    """On one line, and cut between words."""
    text = " ".join(text.split())
    if len(text) <= SHOWN:
        return text
    return (text[:SHOWN].rpartition(" ")[0] or text[:SHOWN]) + " …"


def _fields(payload: Mapping[str, Any]) -> str:
    """What a payload without text holds: its tokens, or whatever it was added with."""
    if "tokens" in payload:
        return str(payload["tokens"])
    return ", ".join(f"{name}: {value}" for name, value in payload.items() if name != "document")


def quarantine_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each request in quarantine."""
    table = _table("quarantine", "id", "service", "asked by", "age", "bytes kept", "why")
    for entry in found:
        row = (entry["id"], entry["service"], entry["asker"], f"{entry['age_s']:.0f} s", str(entry["bytes"]))
        table.add_row(*map(escape, row), escape(entry["why"]))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table


def _services(worker: Mapping[str, Any]) -> str:
    return escape(", ".join(worker.get("services", ())))


def _layers(worker: Mapping[str, Any]) -> str:
    if "layers" not in worker:
        return ""
    first, last, layers = worker["layers"]
    return f"{first}-{last - 1} of {layers}"
