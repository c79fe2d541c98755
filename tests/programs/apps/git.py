"""git: commits all the time, and repacking now and then."""

import os
import subprocess

import common

FILES = 5


def git(data, *args):
    env = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org",
           "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org"}
    return common.run(["git", "-c", "gc.auto=60", "-c", "gc.autoDetach=false", "-c", "safe.directory=*",
                       "-C", f"{data}/repo", *args], env=env)


def work(data):
    ledger = common.Ledger(data, 0, "close")
    while True:
        number = ledger.count + 1
        for file in range(FILES):
            with open(f"{data}/repo/file-{file}", "w") as out:
                out.write(f"{number}\n" * (file * 50 + 1))
        git(data, "add", "-A")
        git(data, "commit", "-q", "-m", str(number))
        ledger.add()
        if number % 40 == 0:
            git(data, "gc", "-q")


def check(data):
    locks = [file for at, _, files in os.walk(f"{data}/repo/.git") for file in files if file.endswith(".lock")]
    common.recovery(len(locks), "lock files to be removed")
    git(data, "fsck", "--full", "--strict")
    count = int(git(data, "rev-list", "--count", "HEAD"))
    number = int(git(data, "log", "-1", "--format=%s"))
    common.expect(count == number, f"{count} commits, the last is {number}")
    for file in range(FILES):
        lines = set(git(data, "show", f"HEAD:file-{file}").split())
        common.expect(lines == {str(number)}, f"file-{file} of commit {number} has {lines}")
    common.expect_ledger(data, 0, count)
    # The next commit.
    for at, _, files in os.walk(f"{data}/repo/.git"):
        for file in files:
            if file.endswith(".lock"):
                os.unlink(os.path.join(at, file))
    git(data, "add", "-A")
    git(data, "commit", "-q", "--allow-empty", "-m", "next")
    common.units(count)


verb, data, scratch, mode = common.arguments()
if verb == "load":
    os.mkdir(f"{data}/repo")
    git(data, "init", "-q")
    common.workers(1, lambda _: work(data))
    common.wait_until(lambda: common.acknowledged(data, 0) > 3, "the first updates")
    common.ready(scratch)
    common.wait_for_ever()
else:
    check(data)
