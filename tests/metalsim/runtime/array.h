// What the simulator needs of std::vector, so that it links without a C++ library.
#pragma once
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

namespace metalsim {

// A growing array of T, which must be movable bytewise and begin as all zero bytes.
template <class T>
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() {
    clear();
    free(data_);
  }

  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }

  void clear() {
    for (T& item : *this) item.~T();
    size_ = 0;
  }
  // Makes it `size` fresh elements.
  void reset(size_t size) {
    clear();
    reserve(size);
    size_ = size;
    if (size) memset((void*)data_, 0, size * sizeof(T));
  }
  // Appends a fresh element.
  T& add() {
    if (size_ == capacity_) reserve(capacity_ ? 2 * capacity_ : 8);
    T* item = data_ + size_++;
    memset((void*)item, 0, sizeof(T));
    return *item;
  }

 private:
  void reserve(size_t capacity) {
    if (capacity <= capacity_) return;
    data_ = (T*)realloc((void*)data_, capacity * sizeof(T));
    if (!data_) abort();
    capacity_ = capacity;
  }

  T* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace metalsim
