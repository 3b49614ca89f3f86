"""Files that ship with the package: default settings, the small model and the demo clip."""

from pathlib import Path

from moss_jax.config import ConfigError

PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path:
    """Finds a shipped file or folder, such as "configs/serve.gin", "assets/demo.mp4" or "moss-tiny".

    In a source tree they are next to the package, in an installed wheel inside it.

    Raises:
      ConfigError: it is in neither.
    """
    root = PACKAGE.parent
    places = root / name, root / "checkpoints" / name, PACKAGE / "_shipped" / name
    for place in places:
        if place.exists():
            return place
    raise ConfigError(
        f"{name} ships with moss_jax, but neither {root} nor {places[-1].parent} has it; "
        "install moss_jax from a clone of its repository or a wheel built there"
    )
