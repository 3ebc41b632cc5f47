"""Implement functions of the project yourself, one at a time; its tests check them.

    python -m exercises list                    list the exercises, in reading order
    python -m exercises start NAME              copy the project to my/NAME, without the body of one function
    python -m exercises check NAME              run the exercise's tests
    python -m exercises hint NAME               print a first step

--folder=FOLDER replaces my/. Needs pytest and hypothesis (extra `test`).
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
    folder: str = 'my'              # of the student's copies


def main(arguments):
    words, settings = configurator.read_with_files(arguments, Settings)
    if words == ['list']:
        for exercise in EXERCISES:
            print(f'{exercise.name:15}{exercise.function}')
        return
    if len(words) != 2 or words[0] not in ('start', 'check', 'hint'):
        raise ValueError('use list, start NAME, check NAME or hint NAME')
    by_name = {exercise.name: exercise for exercise in EXERCISES}
    if words[1] not in by_name:
        near, = difflib.get_close_matches(words[1], by_name, n=1, cutoff=0)
        raise ValueError(f'no exercise {words[1]!r}; did you mean {near!r}? python -m exercises list shows all')
    exercise = by_name[words[1]]
    if words[0] == 'hint':
        print(exercise.hint)
    else:
        {'start': start, 'check': check}[words[0]](exercise, Path(settings.folder, exercise.name))


if __name__ == '__main__':
    with configurator.one_line_errors('exercises', when_stopped='run the same command again'):
        main(sys.argv[1:])
