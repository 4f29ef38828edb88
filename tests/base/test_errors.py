"""What a message of a mistake looks like, whatever is named in it."""

from digitlab.base.errors import UserError, counted


def test_a_message_that_names_something_long_keeps_its_beginning_and_its_advice() -> None:
    short = "it must be short. Cut it."
    message = str(UserError(f"key {'x' * 10**6} is invalid: {short}"))
    assert len(message) < 2100
    assert message.startswith("key xxx")
    assert message.endswith(short)
    assert str(UserError("a\n b")) == "a b"


def test_one_thing_is_counted_in_the_singular() -> None:
    assert [counted(n, "trial") for n in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]
    assert [counted(n, "study", "studies") for n in (1, 2)] == ["1 study", "2 studies"]
