import pytest


@pytest.fixture(scope="session")
def cifar_test(data_dir):
    """The CIFAR-10 test part, decoded once."""
    pytest.importorskip("PIL")
    from resu.experiments.data import read_cifar_jpeg

    file = data_dir / "cifar10" / "cifar10_test_jpeg.npz"
    if not file.is_file():
        pytest.skip(f"no packed CIFAR-10: {file} is absent (set RESU_DATA)")
    return read_cifar_jpeg(file)
