"""Learn by doing: write the project's functions yourself, one at a time, and let its tests say what is still wrong.

    python -m exercises list                    what there is, in reading order
    python -m exercises start NAME              a copy of the project in my/NAME, with one function's body missing
    python -m exercises check NAME              run the tests that decide
    python -m exercises hint NAME               how one may begin

Another folder than my/: --folder=FOLDER. Needs pytest and hypothesis (extra `test`).
"""
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path

import configurator
from exercises.copies import check, start
from exercises.table import EXERCISES


@dataclass
class Settings:
    folder: str = 'my'              # where the student's copies are


def main(arguments):
    words, settings = configurator.read_with_files(arguments, Settings)
    if words == ['list']:
        for exercise in EXERCISES:
            print(f'{exercise.name:15}{exercise.function}')
        return
    if len(words) != 2 or words[0] not in ('start', 'check', 'hint'):
        raise ValueError('say list, start NAME, check NAME or hint NAME')
    by_name = {exercise.name: exercise for exercise in EXERCISES}
    if words[1] not in by_name:
        near, = difflib.get_close_matches(words[1], by_name, n=1, cutoff=0)
        raise ValueError(f'no exercise {words[1]!r}; did you mean {near!r}? python -m exercises list has all')
    exercise = by_name[words[1]]
    if words[0] == 'hint':
        print(exercise.hint)
    else:
        {'start': start, 'check': check}[words[0]](exercise, Path(settings.folder, exercise.name))


if __name__ == '__main__':
    with configurator.one_line_errors('exercises', when_stopped='the same command begins it anew'):
        main(sys.argv[1:])
