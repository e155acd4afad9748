"""`jdistill list WHAT`: one name a line first."""

import functools
import sys
import textwrap
from collections.abc import Callable, Iterable

from jdistill.errors import UsageError, unknown
from jdistill.paths import cache_folder, conf_dir
from jdistill.plugins import load_plugins, named

GROUPS = {
    "losses": "loss",
    "models": "student",
    "data": "data",
    "compression": "compression",
    "schemes": "scheme",
    "tasks": "task",
    "optimizers": "optim",
    "trackers": "tracker",
}

Row = tuple[str, str]


def list_command(arguments: list[str]) -> int:
    """Prints the rows of one kind; aligned columns on a terminal, `name<TAB>text` elsewhere."""
    cache = next((a.partition("=")[2] for a in arguments[1:] if a.startswith("cache=")), "")
    modules = named(arguments[1:])
    kinds: dict[str, Callable[[], Iterable[Row]]] = {
        **{name: functools.partial(_options, group, modules) for name, group in GROUPS.items()},
        "experiments": _experiments,
        "teachers": functools.partial(_teachers, cache),
        "plugins": functools.partial(_plugins, modules),
    }
    usage = f"usage: jdistill list WHAT [cache=FOLDER] [plugins=[MODULE]], with WHAT one of {', '.join(kinds)}"
    usage += "; jdistill list losses --markdown prints formulas, papers and options"
    if arguments[:1] == ["losses"] and "--markdown" in arguments:
        return _losses_in_full([a for a in arguments[1:] if a != "--markdown"], modules, usage)
    if arguments and arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    if not arguments or not all(a.startswith(("cache=", "plugins=")) for a in arguments[1:]):
        raise UsageError(usage)
    if arguments[0] not in kinds:
        raise unknown("list", arguments[0], kinds)
    rows = list(kinds[arguments[0]]())
    width = max((len(name) for name, _ in rows), default=0) if sys.stdout.isatty() else 0
    for name, text in rows:
        print(f"{name:{width}}  {text}" if width else f"{name}\t{text}")
    return 0


def _losses_in_full(rest: list[str], modules: Iterable[str], usage: str) -> int:
    if not all(a.startswith("plugins=") for a in rest):
        raise UsageError(usage)
    from jdistill.losses._catalogue import markdown
    from jdistill.registry import options as registered

    load_plugins(modules)
    print(markdown(registered("loss").values()), end="")
    return 0


def _options(group: str, modules: Iterable[str]) -> Iterable[Row]:
    from jdistill.registry import options as registered

    load_plugins(modules)
    return [(name, option.summary) for name, option in registered(group).items()]


def _plugins(modules: Iterable[str]) -> Iterable[Row]:
    for plugin in load_plugins(modules):
        yield plugin.name, f"{plugin.origin}, sha256 {plugin.checksum}: {' '.join(plugin.options)}"


def _experiments() -> Iterable[Row]:
    for path in sorted((conf_dir() / "experiment").glob("*.yaml")):
        comments = [line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("# ")]
        yield path.stem, textwrap.shorten("; ".join(c for c in comments if not c.startswith("@")), 160, placeholder=" ...")


def _teachers(cache: str) -> Iterable[Row]:
    from jdistill.teachers.saved import list_teachers

    for manifest in list_teachers(cache_folder(cache)):
        primary = manifest.get("primary", "accuracy")
        reached = manifest["metrics"]["test"][primary]
        shown = f"{reached:.2%}" if primary == "accuracy" else f"{reached:.4f}"
        recipe = manifest["config"]["teacher"]["optim"]
        yield (
            f"{manifest['config']['teacher']['name']}-{manifest['hash']}",
            f"{manifest['data']['name']}, test {primary} {shown}, {manifest['parameters']:,} parameters,"
            f" {recipe['name']} lr {recipe['lr']:g} {recipe['epochs']} epochs, sha256 {manifest['checksum'][:12]},"
            f" {manifest['folder']}",
        )
