"""Which texts the embedded checkpoint is trained on, and which ones the demo's datastore holds.

Reads what ships with CPython and with an installed numpy; knows no tokenizer and no model, and never imports numpy.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HELD_OUT_ONE_IN = 50

# Tests document nothing, and site-packages is not the standard library.
STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
NUMPY_SKIPPED = frozenset({"tests", "distutils", "f2py", "_pyinstaller", "testing", "__pycache__"})

# Extension modules have no source to parse. These ship with every build on Unix and are imported without side effects.
COMPILED = (
    "builtins", "sys", "posix", "time", "itertools", "math", "cmath", "array", "binascii", "bz2", "gc", "select",
    "zlib", "marshal", "unicodedata", "_io", "_collections", "_functools", "_operator", "_thread", "_signal",
    "_codecs", "_csv", "_datetime", "_decimal", "_heapq", "_bisect", "_random", "_socket", "_struct", "_weakref",
    "_warnings", "_imp",
)  # fmt: skip


class CorpusError(Exception):
    """The texts are not there; the message says what to install."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text: `name` is unique within its list, `text` starts with the documented name and its signature."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    heading: str
    body: str


def stdlib_documents() -> list[Document]:
    """`pydoc`'s topics and every docstring of the standard library, sorted by name, each body once."""
    root = Path(sysconfig.get_path("stdlib"))
    entries: list[_Entry] = list(_topics())
    for path in _sources(root, STDLIB_SKIPPED):
        entries += _docstrings(path, _module_name(path.relative_to(root)))
    for name in COMPILED:
        entries += _compiled(name)
    return sorted(_documents(entries), key=lambda document: document.name)


def numpy_documents() -> list[Document]:
    """The public docstrings of the installed numpy, in the order of its files: core routines come first.

    Raises CorpusError when numpy is not installed.
    """
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        raise CorpusError("numpy is not installed; install it with: pip install numpy")
    root = Path(spec.origin).parent
    entries: list[_Entry] = []
    for path in _sources(root, NUMPY_SKIPPED):
        module = _public_numpy(_module_name(path.relative_to(root.parent)))
        found = _added_docs(path) if path.name.startswith("_add_newdocs") else _docstrings(path, module)
        entries += (entry for entry in found if not _is_private(entry.name))
    return _documents(entries)


def is_held_out(document: Document) -> bool:
    """True for about one document in fifty, by the hash of its name: the same ones in every run.

    A module and its twin in Python (`decimal`, `_pydecimal`) fall on the same side, since they share their texts.
    """
    name = document.name.removeprefix("_py").removeprefix("_")
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """The documents to train on and those held out, each in the given order."""
    kept: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        (held_out if is_held_out(document) else kept).append(document)
    return kept, held_out


def corpus_hash(documents: Iterable[Document] | None = None) -> str:
    """SHA-256, in hex, over names and texts of `documents` (of `stdlib_documents()` when none are given)."""
    digest = hashlib.sha256()
    for document in stdlib_documents() if documents is None else documents:
        for part in (document.name.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _documents(entries: Iterable[_Entry]) -> list[Document]:
    """Entries as documents, without repeated names or bodies: a copy of a trained text must not be held out."""
    names: set[str] = set()
    bodies: set[str] = set()
    documents: list[Document] = []
    for entry in entries:
        if not entry.body or entry.name in names or entry.body in bodies:
            continue
        names.add(entry.name)
        bodies.add(entry.body)
        documents.append(Document(entry.name, f"{entry.heading}\n\n{entry.body}\n"))
    return documents


def _sources(root: Path, skipped: frozenset[str]) -> list[Path]:
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(found) if not skipped.intersection(path.parts)]


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _topics() -> Iterator[_Entry]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise CorpusError("this Python lacks pydoc_data.topics; use a complete build of CPython") from None
    for name, body in topics.items():
        yield _Entry(f"topics/{name}", f"help({name!r})", inspect.cleandoc(body).strip())


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree, or None for the standard library's deliberately broken sample files."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _docstrings(path: Path, module: str) -> list[_Entry]:
    tree = _parse(path)
    if tree is None:
        return []
    heading = _Entry(module, f"module {module}", _clean(ast.get_docstring(tree)))
    return [heading, *_members(tree, module)]


def _members(node: ast.AST, prefix: str) -> Iterator[_Entry]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            name = f"{prefix}.{child.name}"
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            yield _Entry(name, f"class {name}({bases})", _clean(ast.get_docstring(child)))
            yield from _members(child, name)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{child.name}"
            returns = f" -> {ast.unparse(child.returns)}" if child.returns else ""
            yield _Entry(name, f"{name}({ast.unparse(child.args)}){returns}", _clean(ast.get_docstring(child)))
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _members(child, prefix)


def _clean(body: str | None) -> str:
    """Without numpy's placeholder, and without a signature that stands in front of a line of two dashes."""
    text = (body or "").replace("${ARRAY_FUNCTION_LIKE}", "")
    return (text.partition("\n--\n")[2] or text).strip()


def _compiled(name: str) -> Iterator[_Entry]:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return
    public = name.lstrip("_")
    yield _Entry(public, f"module {public}", inspect.cleandoc(module.__doc__ or ""))
    for key, value in sorted(vars(module).items()):
        if isinstance(value, ModuleType) or key == "__doc__":
            continue
        prefix = "" if name == "builtins" else f"{public}."
        yield from _live(f"{prefix}{key}", value)
        if isinstance(value, type):
            for member, inner in sorted(vars(value).items()):
                yield from _live(f"{prefix}{key}.{member}", inner)


def _live(name: str, value: object) -> Iterator[_Entry]:
    """A compiled class, function, method or attribute: plain values would only repeat the docstring of their type."""
    if not (isinstance(value, type) or inspect.isroutine(value) or inspect.isdatadescriptor(value)):
        return
    doc = value.__doc__
    if isinstance(doc, str):
        signature = getattr(value, "__text_signature__", None)
        kind = "class " if isinstance(value, type) else ""
        yield _Entry(name, f"{kind}{name}{_one_line(signature or '')}", inspect.cleandoc(doc))


def _one_line(signature: str) -> str:
    """A text signature as pydoc shows it: the marked first parameter loses its mark, a module goes altogether."""
    joined = " ".join(signature.split()).replace("( ", "(").replace(", )", ")")
    return (
        joined.replace("($module, /, ", "(").replace("($module, /)", "()").replace("($module, ", "(").replace("$", "")
    )


def _added_docs(path: Path) -> Iterator[_Entry]:
    """What numpy attaches by `add_newdoc(module, name, docs)`: a string, an (attribute, string) pair or pairs.

    numpy 2.4 has `_array_method_doc(name, parameters, docs)` beside it.
    """
    tree = _parse(path)
    for node in ast.walk(tree) if tree else ():
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 3):
            continue
        first, second, docs = _literal(node.args[0]), _literal(node.args[1]), node.args[2]
        if node.func.id == "_array_method_doc":
            name = f"numpy.ndarray.{first}"
            yield _Entry(name, f"{name}({second})", _clean(inspect.cleandoc(_literal(docs))))
        elif node.func.id == "add_newdoc" and first and second:
            name = f"{_public_numpy(first)}.{second}"
            for item in docs.elts if isinstance(docs, ast.List) else [docs]:
                if isinstance(item, ast.Tuple) and len(item.elts) == 2:
                    yield _added(f"{name}.{_literal(item.elts[0])}", _literal(item.elts[1]))
                else:
                    yield _added(name, _literal(item))


def _added(name: str, doc: str) -> _Entry:
    body = inspect.cleandoc(doc)
    signature, marker, _ = body.partition("\n--\n")
    arguments = _one_line("(" + signature.partition("(")[2]) if marker else ""
    return _Entry(name, name + arguments, _clean(body))


def _literal(node: ast.expr) -> str:
    """The string a literal holds, also under method calls such as `.replace(...)`; empty when there is none."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node = node.func.value
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _public_numpy(module: str) -> str:
    """Where users find what a private module of numpy holds: `numpy.linalg._linalg` is `numpy.linalg`."""
    parts = module.split(".")
    private = next((i for i, part in enumerate(parts) if part.startswith("_")), len(parts))
    public = parts[:private]
    return "numpy" if public == ["numpy", "lib"] and private < len(parts) else ".".join(public)


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
