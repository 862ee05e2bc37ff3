import json
import os
import stat
import threading

import pytest

from stemloop import cli
from stemloop.core.errors import InputError, NotAuthorised
from stemloop.instrument.tokens import LIFE_MAX_S, TokenFile, Tokens


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def file(tmp_path, clock):
    return TokenFile(tmp_path / "tokens.json", clock)


def test_an_issued_token_is_known_and_only_its_hash_is_kept(file, clock):
    token, entry = file.issue("agent", "night shift")
    who = Tokens(None, file, "twin", clock).identify(token)
    assert (who.name, who.role, who.rank, who.token_id) == ("agent:night shift", "agent", 1, entry.token_id)
    kept = file.path.read_text()
    secret = token.split("_", 2)[2]
    assert secret not in kept and token not in kept and len(secret) == 43
    assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o600
    assert "sha256" not in entry.public() and "salt" not in entry.public()
    twice = file.issue("agent", "night shift")[1]
    assert twice.salt != entry.salt


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t + "x", lambda t: t.swapcase(), lambda t: ""])
def test_what_is_nearly_a_token_is_none(file, change):
    token, _ = file.issue("viewer")
    with pytest.raises(NotAuthorised, match="not known here"):
        Tokens(None, file).identify(change(token))


def test_a_token_ends_when_it_expires_is_revoked_or_comes_to_another_instrument(file, clock):
    tokens = Tokens(None, file, "twin", clock)
    short, entry = file.issue("agent", life_s=60, instruments=["twin", "usim"])
    other, _ = file.issue("agent", instruments=["titan"])
    who = tokens.identify(short)
    with pytest.raises(NotAuthorised, match="is for titan and not for twin"):
        tokens.identify(other)
    clock.now += 59
    tokens.confirm(who)
    clock.now += 1
    for ask in (lambda: tokens.identify(short), lambda: tokens.confirm(who)):
        with pytest.raises(NotAuthorised, match="has expired"):
            ask()
    long, entry = file.issue("operator", "maria")
    who = tokens.identify(long)
    TokenFile(file.path).revoke(entry.token_id)  # another process
    tokens.refresh()
    for ask in (lambda: tokens.identify(long), lambda: tokens.confirm(who)):
        with pytest.raises(NotAuthorised, match="was revoked"):
            ask()


def test_a_scope_is_kept(file):
    token, _ = file.issue("agent", kinds=["image", "report"])
    who = Tokens(None, file).identify(token)
    who.require_kind("image")
    with pytest.raises(NotAuthorised, match="is for image, report only"):
        who.require_kind("stage")


@pytest.mark.parametrize(
    "asked",
    [{"role": "king"}, {"role": "agent", "name": "a\nb"}, {"role": "agent", "name": "x" * 65},
     {"role": "agent", "life_s": 0}, {"role": "agent", "life_s": LIFE_MAX_S * 2}, {"role": "agent", "kinds": ["fly"]}],
)  # fmt: skip
def test_tokens_that_make_no_sense_are_not_issued(file, asked):
    with pytest.raises(InputError):
        file.issue(**asked)
    assert not file.path.exists()


def test_two_processes_issue_without_losing_any(file):
    def issue():
        mine = TokenFile(file.path)
        for _ in range(10):
            mine.issue("viewer")

    threads = [threading.Thread(target=issue) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(file.entries()) == 30


def test_a_file_that_others_can_read_or_that_is_broken_is_refused(file):
    file.issue("viewer")
    file.path.chmod(0o644)
    with pytest.raises(NotAuthorised, match="chmod 600"):
        file.entries()
    file.path.chmod(0o600)
    for broken in ("{", "[]", '{"tokens": [{"token_id": 1}]}'):
        file.path.write_text(broken)
        with pytest.raises(InputError, match="no file of issued tokens"):
            TokenFile(file.path)


def test_the_command_issues_lists_and_revokes(tmp_path, capsys):
    words = ["instrument", "token"]
    where = str(tmp_path / "scope")
    asked = ["--role", "agent", "--name", "loop", "--hours", "8", "--only", "image"]
    assert cli.main([*words, "issue", where, *asked]) == 0
    line, token = capsys.readouterr().out.splitlines()
    assert Tokens(None, TokenFile(tmp_path / "scope" / "tokens.json")).identify(token).name == "agent:loop"
    assert cli.main([*words, "list", where]) == 0
    assert capsys.readouterr().out.strip() == line and "only image" in line
    assert cli.main([*words, "revoke", where, line.split()[0]]) == 0
    assert "revoked" in capsys.readouterr().out
    assert cli.main([*words, "revoke", where, "nobody"]) == 2
    assert json.loads((tmp_path / "scope" / "tokens.json").read_text())["tokens"][0]["revoked_s"]
