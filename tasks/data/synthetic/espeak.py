"""A separate program that reads requests and answers with speech; `speech` starts and feeds it.

It is separate for two reasons. eSpeak NG's state survives from one utterance to the next (the phase
of its pitch flutter, filters), and no call resets it: here a fork reads each utterance, so all
start from the same state, and the same request gives the same samples. And a process that talks
through pipes and imports only the standard library starts in about 50 ms.

    python espeak.py LIBRARY DATA_FOLDER
    stdin   one JSON list a line: [text, voice, words a minute, pitch 0–99]
    stdout  the sample rate, once; then for each line a number of bytes and that many bytes of
            16-bit samples. Numbers are 4 bytes, little-endian; −1 means that the request failed.

Without fork (on Windows) utterances share one state, and the same request may give samples that
differ slightly in pitch and length.
"""

import ctypes
import json
import os
import struct
import sys
from typing import BinaryIO

# From espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2  # samples go to the callback, and the call returns after the last
_CHARS_UTF8 = 1
_RATE, _VOLUME, _PITCH = 1, 2, 3
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def _serve(library_path: str, data_folder: str, requests: BinaryIO, answers: BinaryIO) -> None:
    library = ctypes.CDLL(library_path)
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_folder.encode(), 0)
    chunks: list[bytes] = []

    def collect(samples: "ctypes._Pointer[ctypes.c_short]", count: int, _: int) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = _CALLBACK(collect)  # the library holds a bare pointer: this name keeps it alive
    library.espeak_SetSynthCallback(callback)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # by default the clock is the seed

    def read(text: str, voice: str, words_a_minute: int, pitch: int) -> bytes | None:
        chunks.clear()
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            return None
        # Setting a voice resets the parameters, so they are set after it.
        library.espeak_SetParameter(_RATE, words_a_minute, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)
        library.espeak_SetParameter(_VOLUME, 100, 0)
        spoken = text.encode()
        failed = library.espeak_Synth(spoken, len(spoken) + 1, 0, 0, 0, _CHARS_UTF8, None, None)
        return None if failed else b"".join(chunks)

    def answer(request: bytes) -> None:
        samples = read(*json.loads(request))
        answers.write(struct.pack("<i", -1 if samples is None else len(samples)))
        answers.write(samples or b"")
        answers.flush()

    answers.write(struct.pack("<i", rate))
    answers.flush()
    for request in iter(requests.readline, b""):
        if not hasattr(os, "fork"):
            answer(request)
        elif (child := os.fork()) == 0:
            answer(request)
            os._exit(0)
        elif os.waitpid(child, 0)[1] != 0:
            return


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], sys.stdin.buffer, sys.stdout.buffer)
