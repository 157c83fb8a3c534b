import errno

import pytest

from launcher.errors import DataError, DiskError, LauncherError, LostRank
from launcher.runtime.failures import classified, code_and_reason
from launcher.runtime.ranks import RankInfo

ALONE, ONE_OF_TWO = RankInfo(0, 0, 1, 1), RankInfo(1, 1, 2, 2)


@pytest.mark.parametrize(
    ("error", "info", "kind", "says"),
    [
        (OSError(errno.ENOSPC, "full", "a.json"), ALONE, DiskError, "a.json could not be written"),
        (RuntimeError("[gloo/pair.cc] Connection closed by peer"), ONE_OF_TWO, LostRank, "another rank ended first"),
        (RuntimeError("[gloo/pair.cc] Connection closed by peer"), ALONE, RuntimeError, "gloo"),
        (RuntimeError("a bug"), ONE_OF_TWO, RuntimeError, "a bug"),
        (DataError("0 rows"), ONE_OF_TWO, DataError, "0 rows"),
    ],
)
def test_an_exception_becomes_the_error_that_names_its_remedy_and_a_bug_stays_itself(error, info, kind, says):
    with pytest.raises(kind, match=says) as caught, classified(info, lambda: "after load 9 MiB"):
        raise error
    assert isinstance(caught.value, LauncherError) or caught.value is error


def test_a_bug_ends_with_code_1_and_its_type_and_text():
    assert code_and_reason(ValueError("a bug")) == (1, "ValueError: a bug")
