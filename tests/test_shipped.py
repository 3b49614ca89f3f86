"""Shipped files: found in a source tree and in an installed package, or said to be missing."""

from pathlib import Path

import pytest

from moss_jax import shipped as shipped_module
from moss_jax.config import ConfigError
from moss_jax.shipped import shipped

ROOT = Path(__file__).resolve().parents[1]


def test_a_source_tree_has_them_beside_the_package():
    assert shipped("configs/serve.gin") == ROOT / "configs" / "serve.gin"
    assert shipped("assets/demo.mp4") == ROOT / "assets" / "demo.mp4"
    assert shipped("moss-tiny") == ROOT / "checkpoints" / "moss-tiny"


def test_an_installed_package_has_them_inside(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "moss_jax"
    monkeypatch.setattr(shipped_module, "PACKAGE", package)
    for name in ("configs/serve.gin", "assets/demo.mp4", "moss-tiny"):
        with pytest.raises(ConfigError, match=f"{name} ships with moss_jax, but neither .* has it"):
            shipped(name)
        file = package / "_shipped" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        assert shipped(name) == file
