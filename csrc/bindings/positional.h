// Python functions of positional arguments without pybind11's conversions: those of one call take 0.4 us, a third of
// what a decode step may do before it launches.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>

namespace hylo {

// Whether it is a Python number, and which.
template <class Number>
bool read_number(pybind11::handle from, Number& out) {
  if (!PyFloat_Check(from.ptr()) && !PyLong_Check(from.ptr())) return false;
  const double number = PyFloat_AsDouble(from.ptr());
  if (number == -1.0 && PyErr_Occurred()) throw pybind11::error_already_set();
  out = static_cast<Number>(number);
  return true;
}

// A function that calls the method, and keeps its owner alive. The method is given the arguments, borrowed, and how
// many there are; it throws as one that pybind11 binds.
template <class Owner, pybind11::object (Owner::*kMethod)(PyObject* const* arguments, Py_ssize_t count)>
pybind11::object positional_function(const pybind11::object& owner) {
  struct Bound {
    pybind11::object object;
    Owner& owner;
  };
  constexpr auto call = [](PyObject* self, PyObject* const* arguments, Py_ssize_t count) -> PyObject* {
    try {
      const auto* bound = static_cast<const Bound*>(PyCapsule_GetPointer(self, nullptr));
      return (bound->owner.*kMethod)(arguments, count).release().ptr();
    } catch (pybind11::error_already_set& raised) {
      raised.restore();
    } catch (const pybind11::builtin_exception& raised) {
      raised.set_error();
    } catch (const std::exception& raised) {
      PyErr_SetString(PyExc_RuntimeError, raised.what());
    }
    return nullptr;
  };
  static constexpr PyObject* (*kCall)(PyObject*, PyObject* const*, Py_ssize_t) = call;
  static PyMethodDef definition{"direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kCall)),
                                METH_FASTCALL, nullptr};

  auto bound = std::make_unique<Bound>(Bound{owner, owner.cast<Owner&>()});
  const pybind11::capsule self(bound.get(), [](void* held) { delete static_cast<Bound*>(held); });
  bound.release();
  auto made = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&definition, self.ptr()));
  if (!made) throw pybind11::error_already_set();
  return made;
}

}  // namespace hylo
