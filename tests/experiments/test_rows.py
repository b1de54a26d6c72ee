from dataclasses import dataclass

import pytest

from resu.experiments import rows


@dataclass(frozen=True)
class Row:
    name: str
    value: float
    count: int
    good: bool
    note: str


def test_rows_come_back_as_they_were(tmp_path):
    given = [Row('a, "b"', 0.1 + i, i, bool(i), "n\t") for i in range(3)]
    for row in given:
        rows.append(tmp_path / "new" / "a.csv", row)
    assert rows.read(tmp_path / "new" / "a.csv", Row) == given
    assert rows.read(tmp_path / "none.csv", Row) == []


def test_a_cut_line_is_left_out_and_the_next_is_whole(tmp_path):
    file = tmp_path / "a.csv"
    for i in range(2):
        rows.append(file, Row("x", 1.0, i, True, "end"))
    file.write_bytes(file.read_bytes()[:-6])
    rows.append(file, Row("y", 2.0, 2, False, "end"))
    assert [row.count for row in rows.read(file, Row)] == [0, 2]


def test_two_writers_that_begin_at_once_leave_two_heads(tmp_path):
    file = tmp_path / "a.csv"
    rows.append(file, Row("x", 1.0, 0, True, "end"))
    file.write_text(2 * file.read_text())
    assert [row.name for row in rows.read(file, Row)] == ["x", "x"]


def test_other_columns_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match="has the columns x, y; expected name, value"):
        rows.read(tmp_path / "a.csv", Row)
    with pytest.raises(ValueError, match="has the columns x, y"):
        rows.append(tmp_path / "a.csv", Row("x", 1.0, 1, True, "n"))


def test_tuples_are_one_cell(tmp_path):
    @dataclass(frozen=True)
    class Many:
        values: tuple[float, ...]
        counts: tuple[int, ...]
        end: int

    given = [Many((0.1, 2.0), (), 1), Many((), (3,), 2)]
    for row in given:
        rows.append(tmp_path / "a.csv", row)
    assert (tmp_path / "a.csv").read_text() == "values,counts,end\n0.1 2.0,,1\n,3,2\n"
    assert rows.as_csv(given) == (tmp_path / "a.csv").read_text()
    assert rows.read(tmp_path / "a.csv", Many) == given
