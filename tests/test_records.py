"Rows as records."
from plumbing.records import hash_keys


def test_pictures_of_two_folders_with_one_name_are_two_pictures():
    def key(source: str) -> list[int]:
        return hash_keys({"images": [source]})
    assert key("/home/ann/train2017/7.jpg") == key("/data/train2017/7.jpg") != key("/data/vg/7.jpg")
