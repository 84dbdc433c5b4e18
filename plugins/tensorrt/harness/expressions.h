// IExprBuilder without TensorRT. A dynamic dimension has a value too, so that expressions over it
// can be evaluated, but does not show it.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

namespace harness {

class Expression final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
 public:
  Expression(int64_t value, bool constant) : value_(value), constant_(constant) {
    nvinfer1::IDimensionExpr::mImpl = this;
  }
  static int64_t value(const nvinfer1::IDimensionExpr& expression) {
    return static_cast<const Expression&>(expression).value_;
  }

  bool isConstant() const override { return constant_; }
  int64_t getConstantValue() const override {
    return constant_ ? value_ : std::numeric_limits<int64_t>::min();
  }
  bool isSizeTensor() const override { return false; }

 private:
  int64_t value_;
  bool constant_;
};

class Expressions final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
 public:
  Expressions() { nvinfer1::IExprBuilder::mImpl = this; }

  const nvinfer1::IDimensionExpr* make(int64_t value, bool constant) {
    pool_.push_back(std::make_unique<Expression>(value, constant));
    return pool_.back().get();
  }

  const nvinfer1::IDimensionExpr* constant(int64_t value) override { return make(value, true); }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation operation,
                                            const nvinfer1::IDimensionExpr& first,
                                            const nvinfer1::IDimensionExpr& second) override {
    const int64_t a = Expression::value(first), b = Expression::value(second);
    const bool constant = first.isConstant() && second.isConstant();
    switch (operation) {
      case nvinfer1::DimensionOperation::kSUM:
        return make(a + b, constant);
      case nvinfer1::DimensionOperation::kSUB:
        return make(a - b, constant);
      case nvinfer1::DimensionOperation::kPROD:
        return make(a * b, constant);
      default:
        return nullptr;
    }
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<Expression>> pool_;
};

}  // namespace harness
