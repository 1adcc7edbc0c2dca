"""What `training.json` says of the files beside it."""

import pytest

from m2m_hf.storage.records import is_inside


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/x", "../x", "a/../../x", "a//b", "./a", "a\\b", "C:x", "a/"])
def test_only_files_inside_the_folder_are_described(name):
    assert not is_inside(name)
    assert is_inside("a/b.json")
