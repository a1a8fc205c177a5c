"""Prompts from CSV files: the columns and their other names, and every kind of bad file."""

from pathlib import Path

import pytest

from unpaint.config import compose, instantiate
from unpaint.errors import UserError
from unpaint.evaluation.prompt_lists import cases_of, prompts_from_csv


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "prompts.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_columns_and_their_other_names(tmp_path: Path) -> None:
    whole = (
        '\ufeff,Prompt,evaluation_seed,evaluation_guidance,case_number\n0,"a cat, asleep",42,7.5,c1\n1,a kitten,,,\n\n'
    )
    rows = prompts_from_csv(written(tmp_path, whole))
    assert [tuple(row) for row in rows] == [("a cat, asleep", 42, 7.5, "c1", 2), ("a kitten", None, None, None, 3)]
    rows = prompts_from_csv(written(tmp_path, "sd_guidance_scale,sd_seed,prompt\n8,3.0,x\n"))
    assert rows[0][:3] == ("x", 3, 8.0)
    assert prompts_from_csv(written(tmp_path, "prompt,seed\r\nx,5\r\n"))[0].seed == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'prompt'; its first line has nothing"),
        ("promt,seed\nx,1\n", "no column 'prompt'; its first line has promt, seed; did you mean promt?"),
        ("prompt\n", "has no prompts"),
        ("prompt,seed\nx,1\n,2\ny,3\n", "line 3: the prompt is empty"),
        ("prompt,seed\nx,1\n\ny,3\n", "line 3: the prompt is empty"),
        ("prompt,seed\nx,1\n ,\n", "line 3: the prompt is empty"),
        ("prompt,seed\nx,one\n", "line 2: the seed 'one' is not a whole number"),
        ("prompt,seed\nx,-1\n", "line 2: the seed '-1'"),
        ("prompt,sd_guidance_scale\nx,nan\n", "line 2: the guidance 'nan' is not a number"),
        (b"prompt\n\xff\xfe\n", "not a CSV file in UTF-8"),
    ],
)
def test_bad_files_are_refused_in_one_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        prompts_from_csv(written(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_too_long(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        prompts_from_csv(tmp_path / "no.csv")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        prompts_from_csv(tmp_path)
    file = written(tmp_path, "prompt\n" + "a cat\n" * 100_000)
    with pytest.raises(UserError, match="more than 10,000 prompts"):
        prompts_from_csv(file)
    assert len(prompts_from_csv(written(tmp_path, "prompt\n" + "a cat\n" * 10_000))) == 10_000


def test_each_row_is_a_picture_that_asks_for_the_concept(tmp_path: Path) -> None:
    rows = prompts_from_csv(written(tmp_path, "prompt,seed,evaluation_guidance\nx,5,2\nx,,\n"))
    concept = instantiate(compose(["concept=cat_on_table"]).concept)
    first, second = cases_of(rows, concept, "static", 0)
    assert (first.seed, first.guidance, first.part) == (5, 2.0, "static")
    assert second.guidance is None
    assert first.wants == {"object/cat": "target", "relation/on a table": "target"}
    assert cases_of(rows, concept, "static", 0) == [first, second]
    assert cases_of(rows, concept, "static", 1)[1].seed != second.seed
    with pytest.raises(UserError, match="'pets' is a set"):
        cases_of(rows, instantiate(compose(["concept=pets"]).concept), "static", 0)
