"""A program that saves its state as JSON: over the old file (`over`), or aside and then put in
place (`replace`)."""

import json
import os

import common


def save(data, mode, state):
    path = f"{data}/state.json"
    if mode == "replace":
        with open(path + ".new", "w") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(path + ".new", path)
    else:
        with open(path, "w") as file:
            json.dump(state, file, indent=1)


def work(data, mode):
    ledger = common.Ledger(data, 0, "sync" if mode == "replace" else "close")
    state = {"moves": 0, "accounts": {str(a): common.START for a in range(common.ACCOUNTS)},
             "log": [], "last": 0}
    while True:
        one, other, amount = common.transfer()
        state["moves"] += 1
        state["accounts"][str(one)] -= amount
        state["accounts"][str(other)] += amount
        state["log"] = (state["log"] + [f"{one} {other} {amount} " * 10])[-300:]
        state["last"] = state["moves"]
        save(data, mode, state)
        ledger.add()
        common.pause()


def check(data, mode):
    common.recovery(int(os.path.exists(f"{data}/state.json.new")), "saves begun")
    try:
        with open(f"{data}/state.json") as file:
            state = json.load(file)
    except (ValueError, OSError) as error:
        common.fail(error)
    balance = sum(state["accounts"].values())
    common.expect(balance == common.TOTAL, f"balances add up to {balance}")
    common.expect(state["moves"] == state["last"], f"{state['moves']} moves, {state['last']} the last")
    common.expect_ledger(data, 0, state["moves"])
    common.units(state["moves"])


verb, data, scratch, mode = common.arguments()
if verb == "load":
    common.workers(1, lambda _: work(data, mode))
    common.wait_until(lambda: common.acknowledged(data, 0) > 3, "the first updates")
    common.ready(scratch)
    common.wait_for_ever()
else:
    check(data, mode)
