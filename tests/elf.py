#!/usr/bin/env python3
"""Check how the extension modules of a wheel for Linux are linked: python tests/elf.py WHEEL

The check fails if a module
- exports another function than those that Python and ONNX Runtime look up by name, because
  such a symbol could replace, or be replaced by, one of another library of the process;
- asks for an executable stack, or has a segment that is both writable and executable;
- leaves the tables that calls of other libraries go through writable;
- looks for libraries elsewhere than beside itself, or holds a path of the machine that built
  it.

It prints which symbols need the newest version of each system library: they decide for which
systems a wheel is.
"""

from __future__ import annotations

import io
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from elftools.elf.constants import P_FLAGS
from elftools.elf.elffile import ELFFile

# ONNX Runtime loads _cpu as a library of an execution provider.
EXPORTS = {
    "_cpu": {"PyInit__cpu", "CreateEpFactories", "ReleaseEpFactory"},
    "_cuda": {"PyInit__cuda"},
}
DF_BIND_NOW, DF_TEXTREL, DF_1_NOW = 0x8, 0x4, 0x1

# Paths of a build: of this tree, and of temporary and home directories.
TREE = re.escape(str(Path(__file__).resolve().parents[1]).encode())
PATH = re.compile(rb"(?:/tmp|/home|/root|" + TREE + rb")/[\x20-\x7e]+")


def exported(elf: ELFFile) -> Iterator[str]:
    """Yield the names of the symbols that other libraries can see."""
    for symbol in elf.get_section_by_name(".dynsym").iter_symbols():
        if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL":
            yield symbol.name


def newest_needed(elf: ELFFile) -> dict[str, tuple[str, list[str]]]:
    """Return per system library the newest version that is needed, and the symbols of it."""
    names: dict[int, str] = {}
    for _, versions in elf.get_section_by_name(".gnu.version_r").iter_versions():
        names |= {version["vna_other"]: version.name for version in versions}
    of_version: dict[str, list[str]] = defaultdict(list)
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    indices = elf.get_section_by_name(".gnu.version").iter_symbols()
    for symbol, version in zip(symbols, indices, strict=True):
        if version["ndx"] in names:
            of_version[names[version["ndx"]]].append(symbol.name)
    newest: dict[str, tuple[str, list[str]]] = {}
    for name in sorted(of_version, key=lambda n: [int(d) for d in re.findall(r"\d+", n)]):
        family = name.split("_")[0]
        if family in ("GLIBC", "GLIBCXX", "CXXABI"):
            newest[family] = (name, sorted(of_version[name]))
    return newest


def problems(stem: str, content: bytes) -> Iterator[str]:
    """Yield what is wrong with the module `stem`, whose file has this content."""
    elf = ELFFile(io.BytesIO(content))
    if others := set(exported(elf)) - EXPORTS[stem]:
        yield f"exports {', '.join(sorted(others))}"

    flags = {segment["p_type"]: segment["p_flags"] for segment in elf.iter_segments()}
    if flags.get("PT_GNU_STACK", P_FLAGS.PF_X) & P_FLAGS.PF_X:
        yield "asks for an executable stack"
    for segment in elf.iter_segments("PT_LOAD"):
        if segment["p_flags"] & P_FLAGS.PF_W and segment["p_flags"] & P_FLAGS.PF_X:
            yield f"has a writable and executable segment at {segment['p_vaddr']:#x}"

    dynamic: dict[str, list[int]] = defaultdict(list)
    for tag in elf.get_section_by_name(".dynamic").iter_tags():
        dynamic[tag["d_tag"]].append(tag["d_val"])
        if tag["d_tag"] in ("DT_RPATH", "DT_RUNPATH"):
            path = getattr(tag, "rpath", None) or tag.runpath
            for folder in path.split(":"):
                if not folder.startswith("$ORIGIN/"):
                    yield f"looks for libraries in {folder}"
    bits, bits_1 = (sum(dynamic[name]) for name in ("DT_FLAGS", "DT_FLAGS_1"))
    if "PT_GNU_RELRO" not in flags or not (bits & DF_BIND_NOW or bits_1 & DF_1_NOW):
        yield "has tables of addresses that stay writable (link with -z relro -z now)"
    if bits & DF_TEXTREL or "DT_TEXTREL" in dynamic:
        yield "has code that is written to when it is loaded"
    for path in sorted(set(PATH.findall(content))):
        yield f"holds the path {path.decode()}"


def main(wheel: Path) -> list[str]:
    """Print what each module needs; return what is wrong."""
    found: list[str] = []
    with zipfile.ZipFile(wheel) as archive:
        modules = [n for n in archive.namelist() if re.search(r"/_c\w+\.[^/]*so$", n)]
        for name in modules:
            content = archive.read(name)
            stem = Path(name).name.split(".")[0]
            for version, symbols in newest_needed(ELFFile(io.BytesIO(content))).values():
                print(f"{stem} needs {version} for {', '.join(symbols)}")
            found += [f"{stem} {problem}" for problem in problems(stem, content)]
    return found if modules else [f"{wheel} has no extension module"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    wrong = main(Path(sys.argv[1]))
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(bool(wrong))
