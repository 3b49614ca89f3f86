"""Adds the small model, the demo clip and the default configs, which are beside the package, to the wheel."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("assets", "checkpoints/moss-tiny", "configs")


class BuildPy(build_py):
    """Copies the shipped folders to `moss_jax/_shipped`, where `moss_jax.shipped` finds them."""

    def run(self):
        """Builds; an editable install finds the folders in the repository."""
        super().run()
        if not self.editable_mode:
            for folder in map(Path, SHIPPED):
                copytree(
                    folder, Path(self.build_lib, "moss_jax", "_shipped", folder.name), dirs_exist_ok=True
                )

    def get_source_files(self):
        """The files that an sdist holds."""
        return [*super().get_source_files(), *(str(p) for folder in SHIPPED for p in Path(folder).iterdir())]


setup(cmdclass={"build_py": BuildPy})
