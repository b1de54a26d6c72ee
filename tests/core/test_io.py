"""Writing where room runs out: which file it was is said, and nothing is cut short in silence."""

import errno
import io
import sys

import pytest
import torch

from resu.core.io import naming, replacing, write_all
from resu.core.mask_files import write_safetensors

resource = pytest.importorskip("resource")


@pytest.fixture
def small_files():
    """No file of this process becomes larger than 2000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize(
    "write", [lambda p: p.write_bytes(bytes(9000)), lambda p: write_safetensors({"a": torch.ones(3000)}, p, {})]
)
def test_input_no_room_names_the_file(tmp_path, small_files, write):
    with pytest.raises(OSError, match="File too large") as caught, replacing(tmp_path / "a.safetensors") as temporary:
        write(temporary)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_errors_about_other_files_keep_their_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a") as temporary:
        temporary.write_bytes((tmp_path / "absent").read_bytes())
    assert caught.value.filename == str(tmp_path / "absent")
    with pytest.raises(OSError, match="broken") as caught, naming(tmp_path / "a"):
        raise OSError(errno.EIO, "broken")  # it may have come from reading
    assert caught.value.filename is None


def test_all_is_written_where_less_is_taken_at_once():
    class Short(io.BytesIO):
        def write(self, data):
            return super().write(data[:3])

    file = Short()
    write_all(file, b"0123456789")
    assert file.getvalue() == b"0123456789"
