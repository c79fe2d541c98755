"""Mail delivered by several processes: one mbox with locks, or a maildir."""

import hashlib
import mailbox
import os
import pathlib
import random

import common

WORKERS = 3
KEPT = 100


def message(worker, number):
    body = f"{worker} {number} {random.random()}\n" * random.randint(5, 200)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return (f"From: worker-{worker}@example.org\nTo: user@example.org\nSubject: {number}\n"
            f"X-Worker: {worker}\nX-Number: {number}\nX-Digest: {digest}\n\n{body}")


def work(data, mode, worker):
    ledger = common.Ledger(data, worker, "plain" if mode == "mbox" else "sync")
    maildir = mailbox.Maildir(f"{data}/maildir") if mode == "maildir" else None
    kept = []
    while True:
        text = message(worker, ledger.count + 1)
        if maildir is not None:
            kept.append(maildir.add(text))
            # Somebody reads, and removes what was read.
            if len(kept) > KEPT:
                maildir.discard(kept.pop(0))
        else:
            mbox = mailbox.mbox(f"{data}/mbox")
            while True:
                try:
                    mbox.lock()
                    break
                except mailbox.ExternalClashError:
                    common.pause()
            mbox.add(text)
            mbox.flush()
            mbox.unlock()
            mbox.close()
        ledger.add()
        common.pause()
        common.pause()


def check(data, mode):
    found = {worker: set() for worker in range(WORKERS)}
    if mode == "maildir":
        common.recovery(len(os.listdir(f"{data}/maildir/tmp")), "deliveries begun (in tmp)")
        box = mailbox.Maildir(f"{data}/maildir", create=False)
    else:
        common.recovery(int(os.path.exists(f"{data}/mbox.lock")), "lock files left")
        box = mailbox.mbox(f"{data}/mbox", create=False)
    for mail in box:
        body = mail.get_payload()
        # An mbox parts messages with an empty line.
        digest = {hashlib.sha256(text.encode()).hexdigest() for text in (body, body + "\n")}
        where = f"message {mail['X-Number']} of {mail['X-Worker']}"
        common.expect(mail["X-Digest"] in digest, f"{where} is not whole")
        number = int(mail["X-Number"])
        common.expect(number not in found[int(mail["X-Worker"])], f"{where} is there twice")
        found[int(mail["X-Worker"])].add(number)
    for worker, numbers in found.items():
        last = max(numbers, default=0)
        gone = last - len(numbers)
        common.expect(numbers == set(range(gone + 1, last + 1)), f"messages of {worker} are missing")
        common.expect(gone == 0 or mode == "maildir" and len(numbers) in (KEPT, KEPT + 1), f"{gone} messages are gone")
        common.expect_ledger(data, worker, last)
    common.units(sum(max(numbers, default=0) for numbers in found.values()))


verb, data, scratch, mode = common.arguments()
if verb == "load":
    if mode == "maildir":
        mailbox.Maildir(f"{data}/maildir")
    common.workers(WORKERS, lambda worker: work(data, mode, worker))
    common.wait_until(lambda: common.acknowledged(data, 0) > 3, "the first updates")
    common.ready(scratch)
    common.wait_for_ever()
else:
    check(data, mode)
