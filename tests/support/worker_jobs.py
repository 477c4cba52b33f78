"""Jobs for workers that behave well, and some that do not."""

import os
import signal
import subprocess
import sys
import time


def double(x):
    return 2 * x


def spin():
    while True:
        pass


def power():
    return len(str(9**9**9))  # one computation in C, in which no signal handler and no other thread runs


def sleep():
    time.sleep(100)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(0)


def stop():
    sys.exit(3)


def eat():
    return len(bytearray(3 << 30))


def much():
    return "x" * (17 << 20)


def talk():
    for _ in range(64):
        print("x" * (1 << 20))
    return 1


def forks():
    os.fork()
    return os.getpid()


def leaves_a_child():
    return subprocess.Popen(["sleep", "100"]).pid


def no_json():
    return object()


def fails():
    raise KeyError("a")


def modules():
    return sorted({"torch", "lightning", "transformers", "numpy"} & sys.modules.keys())


def pid():
    return os.getpid()


def sleepy_pid(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(100)
