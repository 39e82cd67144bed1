from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "robustjax" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
RUNTIME = [
    line
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
TFDS = ["tensorflow-datasets>=4.9.10", "tensorflow-cpu>=2.21"]
NOTEBOOKS = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]

setup(
    name="robustjax",
    version=VERSION,
    description="Adversarial robustness, robust optimization and calibration in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["robustjax", "robustjax.*", "experiments", "experiments.*"]),
    python_requires=">=3.11",
    install_requires=RUNTIME,
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "tfds": TFDS,
        "notebooks": NOTEBOOKS,
        # Peers for benchmarks/ and tests/parity/. They pin other versions of common packages, so
        # those in requirements-parity.txt are installed beside this extra with --no-deps.
        "parity": [
            "torch==2.13.0",
            "requests",
            "scipy",
            "tqdm",
            "pandas",
            "GitPython",
            "eagerpy",
            "pyyaml",
        ],
        "dev": [
            *TFDS,
            *NOTEBOOKS,
            "pytest>=8.4",
            "pytest-xdist>=3.6",
            "pytest-cov>=6.0",
            "beartype>=0.22",
            "scipy>=1.15",
            "ruff>=0.13",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
