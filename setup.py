from setuptools import find_packages, setup

FOLDERS = {"mmadapters": "mmadapters", "mmadapters.tasks": "tasks", "mmadapters.configs": "configs"}

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for root, folder in FOLDERS.items()
        for name in (root, *(f"{root}.{sub}" for sub in find_packages(folder)))
    ],
)
