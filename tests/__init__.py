from tests.old_trl import answer_old_trl

answer_old_trl()
