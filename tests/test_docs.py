"""What the README promises exists, and what exists is in the README."""

import re
from pathlib import Path

from modelfs import config
from modelfs.cli import COMMANDS
from modelfs.metrics import Metrics

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_every_option_is_documented_and_every_documented_option_exists():
    known = {option.flag for option in config.options()}
    missing = {flag for flag in known if flag not in README}
    assert not missing
    table = README[README.index("| option |") : README.index("Credentials come")]
    named = set(re.findall(r"--[a-z][a-z-]+", table)) - {"--path-style", "--virtual-host"}
    assert named == known


def test_every_metric_is_documented_and_every_documented_metric_exists():
    real = set()
    for family in Metrics().registry.collect():
        real.add(family.name + ("_total" if family.type == "counter" else ""))
    named = set(re.findall(r"modelfs_[a-z_]+", README)) - {"model_index"}
    assert named == real


def test_every_command_is_documented():
    assert all(f"modelfs {command}" in README for command in COMMANDS)


def test_commands_of_the_makefile_named_in_the_documents_exist():
    root = Path(__file__).parent.parent
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"\bmake ([a-z-]+)", (root / name).read_text(encoding="utf-8"))) <= targets | {"the"}
