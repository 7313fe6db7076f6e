"""The journal of a long command."""

import tracemalloc

import pytest

from nestcli.jobs.journal import NAME, Journal, file_version


def written(folder, results):
    journal = Journal(folder)
    for key, result in results.items():
        journal.add(key, result)
    journal.close()
    return folder / NAME


def read(folder, *keys):
    journal = Journal(folder)
    try:
        return [journal.get(key) for key in keys]
    finally:
        journal.close()


def test_results_come_back_in_a_later_run(tmp_path):
    results = {"a": [1], "b\0c": {"x": 0.1}, "\udce9": "é", "long": "x" * 5000, "null": None, "newline": "a\nb"}
    written(tmp_path, results)
    assert read(tmp_path, *results, "other") == [*results.values(), None]
    written(tmp_path, {"a": [2]})
    assert read(tmp_path, "a") == [[2]]


def test_a_cut_at_any_byte_costs_the_last_lines_only(tmp_path):
    path = written(tmp_path, {str(number): [number] * number for number in range(6)})
    content = path.read_bytes()
    ends = [place for place, byte in enumerate(content, 1) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        written(tmp_path, {"after": [1]})
        expected = [[number] * number if number < whole else None for number in range(6)]
        assert read(tmp_path, *map(str, range(6)), "after") == [*expected, [1]]


@pytest.mark.parametrize("garbage", [b"\0" * 50, b"{}", b'[1, "a", 2]', b'{"key": "zz', b'{"key": "' + b"0" * 32])
def test_lines_of_no_use_are_passed_over(tmp_path, garbage):
    path = written(tmp_path, {"a": 1})
    path.write_bytes(garbage + b"\n" + path.read_bytes() + garbage + b"\n")
    assert read(tmp_path, "a") == [1]


def test_what_is_held_of_a_result_does_not_grow_with_it(tmp_path):
    written(tmp_path, {f"{number}": "x" * 2000 for number in range(5000)})  # 10 MB
    tracemalloc.start()
    journal = Journal(tmp_path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    journal.close()
    assert held < 5000 * 300


def test_a_file_is_another_when_size_or_time_change(tmp_path):
    path = tmp_path / "a"
    seen = {file_version(str(path))}
    for content in ("x", "xy"):
        path.write_text(content)
        seen.add(file_version(str(path)))
    assert len(seen) == 3
    assert file_version("\0") == "\0\0gone"
