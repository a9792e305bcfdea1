"""A cluster file: TOML to machines, models, indexes, workers, checked; a fault names file, line and what to write.

Knows the form of the file alone: which process follows from it is in tasks.py.
"""

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..schema.errors import Refused

Path_ = tuple[str | int, ...]  # of a value within the document
Positive = Annotated[int, Field(ge=1)]
Value = str | int | float | bool
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HEADER: Final = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_WORD: Final = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_KEY: Final = re.compile(rf"\s*({_WORD}(?:\s*\.\s*{_WORD})*)\s*=\s*(\[\s*(?:#.*)?$)?")
_ADDRESS: Final = re.compile(r"tcp://[^/\s]+:(\d{1,5}|\*)|ipc://\S.*")
_ENTRY: Final = re.compile(r"\s*\{")  # of a list that goes over several lines


class Part(BaseModel):
    """A table of the file; unknown fields are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Center(Part):
    """[cluster]

    Attributes:
        broker: address that the machines connect to.
        bind: address that the broker binds, where it is another one, as tcp://0.0.0.0:5555.
        machine: runs the broker; where there is one machine, that one.
        keys: folder of `ralmq keys init` on that machine.
        insecure: accept others without keys.
        data_plane: of all stages: hub, or ring for hops from neighbour to neighbour.
    """

    broker: str = "tcp://127.0.0.1:5555"
    bind: str = ""
    machine: str = ""
    keys: str = ""
    insecure: bool = False
    data_plane: Literal["hub", "ring"] = "hub"


class Machine(Part):
    """[machines.NAME]

    Attributes:
        host: name of the host, where it is not NAME.
        memory: for weights and caches of models that are placed here: 8GiB, or cuda:0:20GiB+cpu:8GiB.
        speed: GB/s of weights that it reads for a token, one for all devices or 900+12; measured where not given.
        threads: of each of its stages.
        address: of this machine as its neighbours in a ring see it.
        keys: key file or folder on this machine, where $RALMQ_KEYS and --keys name none.
        models: directories of models on this machine, by name, where they are not as in the file.
    """

    host: str = ""
    memory: str = ""
    speed: float | str = ""
    threads: Positive = 1
    address: str = ""
    keys: str = ""
    models: dict[str, str] = {}


class Stage(Part):
    """An entry of `stages` of a model: layers as 0:6; a spare stands by for another stage of the same layers."""

    machine: str = ""
    layers: str
    spare: bool = False
    options: dict[str, Value] = {}


class Model(Part):
    """[models.NAME]

    Attributes:
        path: a model directory, or demo.
        machines: that share the layers, as the planner splits them; all where not given.
        stages: the layers by hand instead.
        generator: machine of the generator; the broker's where not given.
        kv_tokens: tokens whose keys and values each stage keeps.
        options: further options of each stage.
    """

    path: str
    machines: list[str] = []
    stages: list[Stage] = []
    generator: str = ""
    kv_tokens: Positive = 4096
    dtype: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    options: dict[str, Value] = {}


class Index(Part):
    """[indexes.NAME]: a directory, and the machines that serve it."""

    path: str
    machine: str = ""
    machines: list[str] = []
    options: dict[str, Value] = {}


class Extra(Part):
    """[[workers]]: any worker, as in `ralmq worker`."""

    worker: str
    machine: str = ""
    name: str = ""
    threads: Positive = 1
    options: dict[str, Value] = {}


class ClusterFile(Part):
    """The whole file."""

    cluster: Center = Center()
    machines: dict[str, Machine] = {}
    models: dict[str, Model] = {}
    indexes: dict[str, Index] = {}
    workers: list[Extra] = []


class Source:
    """A file that was read: what it says, and on which line."""

    def __init__(self, path: Path, text: str, parsed: ClusterFile) -> None:
        self.path = path
        self.file = parsed
        self._lines = _lines(text)

    def fault(self, place: Path_, what: str) -> Refused:
        """An error at the line of a value, or of the nearest table around it."""
        return Refused(f"{self.path}:{_line(self._lines, place)}: {what}")

    @property
    def center(self) -> str:
        """The machine that runs the broker."""
        return self.file.cluster.machine or next(iter(self.file.machines), "")

    def machine(self, name: str, place: Path_) -> str:
        """A machine that the file names; the broker's for an empty name.

        Raises:
            Refused: there is none of that name.
        """
        if not name:
            return self.center
        if name not in self.file.machines:
            raise self.fault(place, f"no machine is called {name!r}{suggestion(name, list(self.file.machines))}")
        return name


def read_file(path: Path) -> Source:
    """A cluster file.

    Raises:
        Refused: it cannot be read, is no TOML, or says something that has no meaning; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}: name a cluster file, as docs/cluster.md shows one") from None
    except UnicodeDecodeError:
        raise Refused(f"{path}: is no text in UTF-8: write the file as such") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\s*\(at line (\d+), column \d+\)|\s*\(at end of document\)", str(error))
        line = found[1] if found and found[1] else len(text.splitlines()) or 1
        said = str(error)[: found.start()] if found else str(error)
        raise Refused(f"{path}:{line}: no TOML: {said}; write texts in quotes and each table once") from None
    try:
        parsed = ClusterFile.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(part for part in first["loc"] if part not in ("float", "str", "int", "bool"))
        raise Refused(f"{path}:{_line(_lines(text), place)}: {_said(first, place)}") from None
    source = Source(path, text, parsed if parsed.machines else parsed.model_copy(update={"machines": _alone(parsed)}))
    _check(source)
    return source


def suggestion(word: str, known: Sequence[str]) -> str:
    """`: did you mean X?`, or the words that there are."""
    near = difflib.get_close_matches(word, known, 1, 0.6)
    return f": did you mean {near[0]}?" if near else f": there {'are' if len(known) > 1 else 'is'} {', '.join(known)}"


def _alone(parsed: ClusterFile) -> dict[str, Machine]:
    return {parsed.cluster.machine or "local": Machine()}


def _check(source: Source) -> None:
    """What the types do not say: names, and machines that are there."""
    file = source.file
    for table in ("machines", "models", "indexes"):
        for name in getattr(file, table):
            if not NAME.fullmatch(name):
                raise source.fault((table, name), f"{name!r} is no name: use letters, digits, dots, dashes")
    for address in ("broker", "bind"):
        told = getattr(file.cluster, address)
        if not _ADDRESS.fullmatch(told) and (told or address == "broker"):
            raise source.fault(("cluster", address), f"{told!r} is no address: write tcp://host:port")
    source.machine(file.cluster.machine, ("cluster", "machine"))
    for name, model in file.models.items():
        if model.stages and model.machines:
            raise source.fault(("models", name, "machines"), "give either machines, or stages with layers for each")
        for number, machine in enumerate(model.machines):
            source.machine(machine, ("models", name, "machines", number))
        if len(set(model.machines)) < len(model.machines):
            raise source.fault(("models", name, "machines"), "a machine is named twice: name each once")
        for number, stage in enumerate(model.stages):
            source.machine(stage.machine, ("models", name, "stages", number, "machine"))
        source.machine(model.generator, ("models", name, "generator"))
    for name, index in file.indexes.items():
        for machine in (index.machine, *index.machines):
            source.machine(machine, ("indexes", name, "machine"))
    for number, extra in enumerate(file.workers):
        source.machine(extra.machine, ("workers", number, "machine"))
        if extra.name and not NAME.fullmatch(extra.name):
            raise source.fault(
                ("workers", number, "name"), f"{extra.name!r} is no name: use letters, digits, dots, dashes"
            )


def _said(error: Any, place: Path_) -> str:
    """What is wrong with a value, and what to write."""
    where = ".".join(map(str, place[:-1]))
    last = str(place[-1]) if place else "the file"
    if error["type"] == "extra_forbidden":
        known = _fields(place[:-1])
        return f"unknown field {last!r}{f' of {where}' if where else ''}{suggestion(last, known)}"
    if error["type"] == "missing":
        return f"{where} lacks {last}: write {last} = ..."
    message = str(error["msg"]).removeprefix("Input should be ")
    return f"{last} should be {message}, not {error['input']!r:.60}"


def _fields(place: Path_) -> list[str]:
    """The fields of the table at a place."""
    kind: Any = ClusterFile
    for part in place:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation if str(part) in kind.model_fields else None
        else:
            kind = get_args(kind)[-1] if get_args(kind) else None
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _lines(text: str) -> dict[Path_, int]:
    """Where each table and each key stands; of values within values the line of the outer one."""
    found: dict[Path_, int] = {}
    counts: dict[Path_, int] = {}
    table: Path_ = ()
    listing: Path_ = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            names = _parts(header[2])
            table = ()
            for place, part in enumerate(names):
                table = (*table, part)
                if header[1] == "[[" and place == len(names) - 1:
                    counts[table] = counts.get(table, -1) + 1
                if table in counts:
                    table = (*table, counts[table])
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            found.setdefault((*table, *_parts(key[1])), number)
            listing = (*table, *_parts(key[1])) if key[2] else ()
        elif listing and _ENTRY.match(line):
            counts[listing] = counts.get(listing, -1) + 1
            found[*listing, counts[listing]] = number
    return found


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(_WORD, dotted))


def _line(lines: dict[Path_, int], place: Path_) -> int:
    """Of the value, or of the longest beginning of its path that has a line."""
    for length in range(len(place), 0, -1):
        inner = [line for path, line in lines.items() if path[:length] == place[:length]]
        if inner:
            return min(inner)
    return 1
