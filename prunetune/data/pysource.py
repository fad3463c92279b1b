"""What the Python sources installed here document: names, signatures and docstrings, read with ``ast``.

Nothing is imported from a file that has source, so no module's side effects run. Modules written in C have no
source; the few standard ones that are worth asking about are looked at through ``inspect``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

# Left out of the standard library: side effects on import, tests, tools, platform twins of another module.
_SKIPPED_STDLIB_LIST = """
antigravity this idlelib lib2to3 turtle turtledemo tkinter test ensurepip venv pydoc_data pydoc
distutils msilib ntpath nturl2path opcode symtable tabnanny pyclbr sre_compile sre_constants
sre_parse crypt nis nt encodings genericpath imp asyncore asynchat smtpd cgi cgitb uu xdrlib
telnetlib nntplib pipes
"""
SKIPPED_STDLIB = frozenset(_SKIPPED_STDLIB_LIST.split())
# Written in C and safe to import: asking about them needs ``inspect``.
C_MODULES = (
    "array", "binascii", "builtins", "cmath", "collections", "datetime", "decimal", "functools", "gc", "io",
    "itertools", "marshal", "math", "os", "select", "struct", "sys", "time", "unicodedata", "zlib",
)  # fmt: skip
SKIPPED_PACKAGES = frozenset({"prunetune", "pip", "setuptools", "pkg_resources", "wheel", "tests", "test"})
# A few lines per package are enough, and parsing must stay quick whatever is installed.
STDLIB_FILES = 8
PACKAGE_FILES = 4
BYTES_PER_FILE = 250_000
MAX_SIGNATURE = 200


@dataclass(frozen=True)
class Entry:
    """One documented thing; ``top`` is its top-level module, ``signature`` starts with ``(``."""

    name: str
    kind: str  # module, class, function, method or property
    top: str
    signature: str | None
    doc: str
    members: tuple[str, ...] = ()


def stdlib_files() -> Iterator[tuple[str, list[tuple[str, Path]]]]:
    """Each public standard module that has source, with its (module name, file) pairs, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - SKIPPED_STDLIB):
        if name.startswith("_"):
            continue
        files = _module_files(root, name, STDLIB_FILES)
        if files:
            yield name, files


def package_files() -> Iterator[tuple[str, list[tuple[str, Path]]]]:
    """Each importable package among the installed distributions, with its (module name, file) pairs."""
    for name, distributions in sorted(importlib.metadata.packages_distributions().items()):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in SKIPPED_PACKAGES or "mypyc" in name:
            continue
        if name in sys.stdlib_module_names or any(d.lower() in SKIPPED_PACKAGES for d in distributions):
            continue
        root = Path(str(importlib.metadata.distribution(distributions[0]).locate_file("")))
        files = _module_files(root, name, PACKAGE_FILES)
        if files:
            yield name, files


def _module_files(root: Path, name: str, most: int) -> list[tuple[str, Path]]:
    """The module's file, or at most ``most`` public files of the package, the shallowest first."""
    single = root / f"{name}.py"
    if single.is_file():
        return [(name, single)]
    package = root / name
    if not (package / "__init__.py").is_file():
        return []
    files = [(name, package / "__init__.py")]
    reexported = set(_exports(_parse(package / "__init__.py"), name).values())
    for path in [*sorted(package.glob("*.py")), *sorted(package.glob("*/*.py"))]:
        if len(files) == most:
            break
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        module = ".".join(parts)
        hidden = any(part.startswith(("_", "test")) or part in {"conftest", "vendor", "setup"} for part in parts)
        if module != name and path.stat().st_size <= BYTES_PER_FILE and (not hidden or module in reexported):
            files.append((module, path))
    return files


@lru_cache(maxsize=1)  # a package's first file is read for what it re-exports and, right after, for itself
def _parse(path: Path) -> ast.Module:
    """The syntax tree of a file; an empty one if this interpreter cannot read it (templates)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _exports(tree: ast.Module, package: str) -> dict[str, str]:
    """What ``package/__init__.py`` re-exports: ``{name or "*module": module it comes from}``."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            module = f"{package}.{node.module}" if node.level == 1 else node.module
            if node.level <= 1 and module.startswith(package + "."):
                for alias in node.names:
                    found[f"*{module}" if alias.name == "*" else (alias.asname or alias.name)] = module
    return found


def read_package(top: str, files: Iterable[tuple[str, Path]]) -> Iterator[Entry]:
    """Entries of one top-level module; a re-exported name is called by its short, public name."""
    exports: dict[str, str] = {}
    owner = _spoken(top).split(".")[0]
    for module, path in files:
        tree = _parse(path)
        if module == top:
            exports = _exports(tree, top)
        public = _public_names(tree)
        doc = ast.get_docstring(tree)
        hidden = any(part.startswith("_") for part in module.split("."))
        if doc and not hidden:
            yield Entry(_spoken(module), "module", owner, None, doc, tuple(public))
        for node in tree.body:
            name = getattr(node, "name", None)
            if name not in public:
                continue
            short = exports.get(name) == module or f"*{module}" in exports
            if short or not hidden:
                yield from _read_node(node, _spoken(top if short else module), owner)


def _spoken(module: str) -> str:
    """The name that people write for a module."""
    return "os.path" if module == "posixpath" else module


def _public_names(tree: ast.Module) -> list[str]:
    """Names of the functions and classes that a module offers, in the order of the file."""
    defined = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
    ]
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.List | ast.Tuple):
            continue
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            listed = {item.value for item in node.value.elts if isinstance(item, ast.Constant)}
            return [name for name in defined if name in listed]
    return defined


def _read_node(node: ast.stmt, owner: str, top: str) -> Iterator[Entry]:
    """The entry of a function, or of a class and its public methods."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node)
        if doc:
            yield Entry(f"{owner}.{node.name}", "function", top, signature_text(node.args), doc)
    elif isinstance(node, ast.ClassDef):
        name = f"{owner}.{node.name}"
        methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}
        public = tuple(sorted(item for item in methods if not item.startswith("_")))
        doc = ast.get_docstring(node)
        if doc:
            init = methods.get("__init__")
            yield Entry(name, "class", top, signature_text(init.args, bound=True) if init else None, doc, public)
        for method in public:
            yield from _read_method(methods[method], name, top)


def _read_method(node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str, top: str) -> Iterator[Entry]:
    decorators = {ast.unparse(item).rsplit(".", 1)[-1] for item in node.decorator_list}
    doc = ast.get_docstring(node)
    if not doc or decorators & {"overload", "setter", "deleter", "deprecated"}:
        return
    if decorators & {"property", "cached_property"}:
        yield Entry(f"{owner}.{node.name}", "property", top, None, doc)
    else:
        bound = "staticmethod" not in decorators
        yield Entry(f"{owner}.{node.name}", "method", top, signature_text(node.args, bound=bound), doc)


def signature_text(arguments: ast.arguments, *, bound: bool = False) -> str | None:
    """``(a, b=1, *, c)`` without annotations; None if it is too long to be an answer."""
    bare = ast.arguments(
        posonlyargs=[ast.arg(item.arg) for item in arguments.posonlyargs],
        args=[ast.arg(item.arg) for item in arguments.args],
        vararg=ast.arg(arguments.vararg.arg) if arguments.vararg else None,
        kwonlyargs=[ast.arg(item.arg) for item in arguments.kwonlyargs],
        kw_defaults=arguments.kw_defaults,
        kwarg=ast.arg(arguments.kwarg.arg) if arguments.kwarg else None,
        defaults=arguments.defaults,
    )
    if bound:
        del (bare.posonlyargs or bare.args)[:1]
        left = len(bare.posonlyargs) + len(bare.args)
        bare.defaults = bare.defaults[-left:] if left else []
    text = f"({ast.unparse(bare)})"
    return text if len(text) <= MAX_SIGNATURE and "\n" not in text else None


def read_c_module(name: str) -> Iterator[Entry]:
    """Entries of the functions and classes of a standard module that are written in C, and their methods."""
    module = importlib.import_module(name)
    prefix = "" if name == "builtins" else f"{name}."
    for attribute in sorted(vars(module)):
        value = getattr(module, attribute)
        # Hooks are there to be replaced: what they say depends on who runs us.
        if attribute.startswith("_") or attribute.endswith("hook") or not _is_c(value, module):
            continue
        doc = inspect.getdoc(value)
        if doc and not (isinstance(value, type) and issubclass(value, BaseException)):
            kind = "class" if isinstance(value, type) else "function"
            yield Entry(f"{prefix}{attribute}", kind, name, c_signature(value), doc)
        if isinstance(value, type):
            for method in sorted(vars(value)):
                function = vars(value)[method]
                if not method.startswith("_") and inspect.ismethoddescriptor(function) and function.__doc__:
                    text = c_signature(function)
                    yield Entry(f"{prefix}{attribute}.{method}", "method", name, text, function.__doc__)


def _is_c(value: Any, module: ModuleType) -> bool:
    """Whether ``value`` is a function or class written in C that ``module`` itself stands for."""
    if not (inspect.isbuiltin(value) or isinstance(value, type)):
        return False
    home = getattr(value, "__module__", None) or ""
    if home not in {module.__name__, f"_{module.__name__}", "posix", "_functools", "_io"}:
        return False
    return inspect.isbuiltin(value) or not hasattr(sys.modules.get(home), "__file__")


def c_signature(value: Any) -> str | None:
    """The signature that a C function declares, without ``self``; None if it declares none."""
    try:
        text = str(inspect.signature(value))
    except (ValueError, TypeError):
        return None
    text = re.sub(r"^\((self|type|cls|\$\w+)(, /)?(, |(?=\)))", "(", text)
    return text if len(text) <= MAX_SIGNATURE and "<" not in text else None
