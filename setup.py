"""What pyproject.toml cannot say: the shipped configs, which lie beside the package in the repository, travel inside it."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Puts configs/ into the built package as s2l_ray/configs/. An editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "s2l_ray" / "configs"
        self.mkpath(str(folder))
        for path in sorted(Path(__file__).parent.joinpath("configs").glob("*")):
            if path.suffix in {".yaml", ".json"}:
                self.copy_file(str(path), str(folder / path.name))


setup(cmdclass={"build_py": BuildWithConfigs})
